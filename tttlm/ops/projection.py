"""A linear projection as one product of matrices, for `nnx.Linear(dot_general=projection)`."""

from typing import Any

import jax
from jax.lax import dot_general
from jaxtyping import Array, Float

from tttlm.ops.varying import varying_like


def projection(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], dimension_numbers: Any, precision: Any = None, **options: Any
) -> Float[Array, "*B O"]:
    """`x @ kernel`; takes the arguments that `nnx.Linear` passes to `jax.lax.dot_general`.

    On one device the leading axes of `x` are merged. Otherwise XLA on CPU copies the gradient of the output in
    transposed order for the gradient of the kernel, and computes all that is fused into it once more: a quarter more
    processor time for a gated product of two projections. Axes that a mesh may shard are left as they are.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    kernel = varying_like(kernel, x)
    leading, sharded = x.shape[:-1], jax.sharding.get_abstract_mesh().size > 1
    rows = x if sharded or x.ndim < 3 else x.reshape(-1, x.shape[-1])
    y = dot_general(rows, kernel, (((rows.ndim - 1,), (0,)), ((), ())), precision=precision, **options)
    return y.reshape(*leading, y.shape[-1])
