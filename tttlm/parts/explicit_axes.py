"""Layers on a mesh with `Explicit` axes, the default of `jax.make_mesh`: within a layer the compiler decides.

On such a mesh the sharding of every array is part of its type, and an operation with an ambiguous sharding is refused.
Within a layer the compiler chooses shardings on any mesh (`jax.sharding.auto_axes`); its outputs and states have the
shardings of its input and state.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType

F = TypeVar("F", bound=Callable[..., Any])


def any_mesh(method: F) -> F:
    """Decorates a method from `(x, state, ...)` to outputs like `x` and a state like `state`, so that it works on any
    mesh.

    Either may be None.
    """

    @functools.wraps(method)
    def run(self: nnx.Module, x: jax.Array, state: Any, *arguments: Any) -> Any:
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return method(self, x, state, *arguments)
        graph, parameters = nnx.split(self)
        leaves, structure = jax.tree.flatten((x, state, arguments))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        def inside(parameters: Any, arrays: list[jax.Array]) -> Any:
            given = iter(arrays)
            filled = [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
            x, state, arguments = jax.tree.unflatten(structure, filled)
            return method(nnx.merge(graph, parameters), x, state, *arguments)

        shardings = jax.tree.map(lambda a: jax.typeof(a).sharding, (x, state))
        return jax.sharding.auto_axes(inside, out_sharding=shardings)(parameters, arrays)

    return run  # type: ignore[return-value]
