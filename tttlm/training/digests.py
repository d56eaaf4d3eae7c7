"""A short digest of every array of a tree: equal for equal bits on any mesh, different if any single value changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from tttlm.training.sharding import path_name

_PIECE = 1 << 20  # elements whose digest is computed at a time


def digests(tree: Any) -> dict[str, str]:
    """Returns `dtype:checksum` of every array by its path; any single changed value changes its checksum."""
    sums = jax.device_get(_digests(tree))
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(sums), strict=True)
    return {path_name(path): f"{x.dtype}:{digest}" for (path, x), digest in leaves}


def digest_of(array: np.ndarray) -> str:
    """The digest of one array in the host's memory, as `digests` gives it, without a second copy of the array."""
    bits = array.reshape(-1).view(f"uint{min(array.dtype.itemsize, 4) * 8}")
    total = 0
    for begin in range(0, bits.size, _PIECE):
        piece = bits[begin : begin + _PIECE].astype(np.uint32)
        position = np.arange(begin, begin + piece.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(piece * (position * np.uint32(2654435761) * 2 + 1), dtype=np.uint32))
    return f"{array.dtype}:{total % 2**32}"


@jax.jit
def _digests(tree: Any) -> Any:
    return jax.tree.map(_digest, tree)


def _digest(x: Array) -> UInt[Array, ""]:
    """The bits of every element times an odd number that depends on its position, summed modulo 2**32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(x.dtype.itemsize, 4) * 8}")).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (position * np.uint32(2654435761) * 2 + 1), dtype=jnp.uint32)
