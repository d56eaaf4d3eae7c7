"""Varying axes within `jax.shard_map`: the carry of a loop must have the same ones before and after it."""

from typing import Any

import jax


def varying_like(tree: Any, like: jax.Array) -> Any:
    """`tree`, whose arrays may differ along every mesh axis along which `like` does.

    `jax.shard_map` tracks these axes, and requires that the carry of a loop has the same ones before and after it.
    Elsewhere this changes nothing.
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
