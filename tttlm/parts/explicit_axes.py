"""Layers on a mesh with `Explicit` axes, as `jax.make_mesh` makes them: within a layer the compiler decides.

There the sharding of every array is part of its type, and an operation that could give either of two shardings is
refused. Layers leave that choice to the compiler on any mesh (`jax.sharding.auto_axes`), and their outputs and states
have the shardings of what came in.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType

F = TypeVar("F", bound=Callable[..., Any])


def any_mesh(method: F) -> F:
    """Decorates a method from `(x, state, ...)` to outputs like `x` and a state like `state`, so that any mesh will do.

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
