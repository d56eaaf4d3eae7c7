"""A short digest of every array of a tree: equal for equal bits on any mesh, different if any single value changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from tttlm.training.sharding import path_name


def digests(tree: Any) -> dict[str, str]:
    """Returns `dtype:checksum` of every array by its path; any single changed value changes its checksum."""
    sums = jax.device_get(_digests(tree))
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(sums), strict=True)
    return {path_name(path): f"{x.dtype}:{digest}" for (path, x), digest in leaves}


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
