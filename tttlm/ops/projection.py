"""A linear projection whose gradient is written out, for `nnx.Linear(dot_general=projection)`."""

from typing import Any

import jax
from jax.lax import dot_general
from jaxtyping import Array, Float

from tttlm.ops.varying import varying_like


def projection(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], dimension_numbers: Any, precision: Any = None, **options: Any
) -> Float[Array, "*B O"]:
    """`x @ kernel`; takes the arguments that `nnx.Linear` passes to `jax.lax.dot_general`.

    The kernel's gradient is computed as `x^T dy`. Derived by JAX it is the transpose of `dy^T x`, for which XLA on CPU
    copies `dy` in transposed order, recomputing all that is fused into it: a third more processor time for a gated
    product of two projections. Differentiable in reverse mode.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return _product(precision, x, varying_like(kernel, x))


def _product_of(precision: Any, x: Array, kernel: Array) -> Array:
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _forward(precision: Any, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product_of(precision, x, kernel), (x, kernel)


def _backward(precision: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    for_x = dot_general(dy, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    return for_x, dot_general(x, dy, ((rows, rows), ((), ())), precision=precision)


_product = jax.custom_vjp(_product_of, nondiff_argnums=(0,))
_product.defvjp(_forward, _backward)
