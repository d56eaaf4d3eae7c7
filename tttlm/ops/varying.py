"""Within `jax.shard_map`, which arrays differ from device to device: a loop has to start with what it ends with."""

from typing import Any

import jax


def varying_like(tree: Any, like: jax.Array) -> Any:
    """`tree`, whose arrays may differ along every mesh axis along which `like` does.

    `jax.shard_map` keeps count of these axes, and asks that the carry of a loop has the same ones before and after it.
    Anywhere else this changes nothing.
    """
    axes = _varying(like)
    if not axes:
        return tree

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying(a))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def _varying(a: jax.Array) -> frozenset[str]:
    kind: Any = jax.typeof(a)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # the second before JAX 0.10.2
