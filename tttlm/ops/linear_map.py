"""Linear maps whose transpose is written out, differentiable in every mode and to every order.

JAX derives reverse mode by transposing the tangents of forward mode. `jax.custom_vjp` replaces the result by a faster
one, and forward mode and second order are lost. `linear_map` replaces the transpose alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_Flat = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]


def linear_map(
    function: Callable[[Any, Any], Any], transpose: Callable[[Any, Any], Any], residuals: Any, x: Any
) -> Any:
    """`function(residuals, x)`, which is linear in `x`; reverse mode calls `transpose`.

    Args:
        function: made of differentiable and transposable operations, from which all other derivatives come.
        transpose: `transpose(residuals, y)` is the transpose of `x -> function(residuals, x)` at `y`; it is not
            differentiated.
        residuals: arrays in any structure.
        x: arrays in any structure.
    """
    flat_residuals, of_residuals = jax.tree.flatten(residuals)
    flat_x, of_x = jax.tree.flatten(x)
    of_y = jax.tree.structure(jax.eval_shape(function, residuals, x))

    def forward(residuals, x):
        return jax.tree.leaves(function(jax.tree.unflatten(of_residuals, residuals), jax.tree.unflatten(of_x, x)))

    def backward(residuals, y):
        return jax.tree.leaves(transpose(jax.tree.unflatten(of_residuals, residuals), jax.tree.unflatten(of_y, y)))

    return jax.tree.unflatten(of_y, _bind(flat_residuals, flat_x, forward, backward, turned=False))


_map = Primitive("linear_map")
_map.multiple_results = True


def _bind(residuals: Sequence[Any], x: Sequence[Any], forward: _Flat, backward: _Flat, turned: bool) -> Sequence[Any]:
    """Binds the map, or, `turned`, its transpose."""
    residuals, x = list(residuals), list(x)
    types = jax.make_jaxpr(backward if turned else forward)(residuals, x).out_avals
    return _map.bind(
        *residuals, *x, count=len(residuals), forward=forward, backward=backward, turned=turned, types=tuple(types)
    )


def _apply(*args, count, forward, backward, turned, types):
    return (backward if turned else forward)(list(args[:count]), list(args[count:]))


def _jvp(primals, tangents, *, count, forward, backward, turned, types):
    rebind = lambda x: _bind(primals[:count], x, forward, backward, turned)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        terms.append(rebind([ad.instantiate_zeros(t) for t in tangents[count:]]))
    moving = [i for i, t in enumerate(tangents[:count]) if type(t) is not ad.Zero]

    def definition(*values):
        residuals = list(primals[:count])
        for i, value in zip(moving, values, strict=True):
            residuals[i] = value
        of_x = lambda *x: forward(residuals, list(x))
        if turned:
            return list(jax.linear_transpose(of_x, *types)(list(primals[count:])))
        return list(of_x(*primals[count:]))

    if moving:
        terms.append(jax.jvp(definition, [primals[i] for i in moving], [tangents[i] for i in moving])[1])
    return rebind(primals[count:]), terms[0] if len(terms) == 1 else [a + b for a, b in zip(*terms, strict=True)]


def _transpose(cotangents, *args, count, forward, backward, turned, types):
    y = [ad.instantiate_zeros(ct) for ct in cotangents]
    x = _bind(args[:count], y, forward, backward, not turned)
    return [None] * count + [c if ad.is_undefined_primal(a) else None for a, c in zip(args[count:], x, strict=True)]


def _batch(args, dims, *, count, forward, backward, turned, types):
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    front = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
    axes = [None if d is None else 0 for d in dims[:count]]
    x = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else a
        for a, d in zip(front[count:], dims[count:], strict=True)
    ]
    mapped = [jax.vmap(f, in_axes=(axes, 0)) for f in (forward, backward)]
    y = _bind(front[:count], x, mapped[0], mapped[1], turned)
    return y, [0] * len(y)


_map.def_impl(_apply)
_map.def_abstract_eval(lambda *args, types, **_: types)
ad.primitive_jvps[_map] = _jvp
ad.primitive_transposes[_map] = _transpose
batching.primitive_batchers[_map] = _batch
mlir.register_lowering(_map, mlir.lower_fun(_apply, multiple_results=True))
