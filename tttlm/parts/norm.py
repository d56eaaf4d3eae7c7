"""Root-mean-square normalisation, as in Llama and TTT models."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis (arXiv 1910.07467), computed in float32 at least.

    Args:
        num_features: size of the last axis.
        eps: epsilon added to the mean square.
        dtype: dtype of the result; None promotes input and scale.
        param_dtype: dtype of the scale.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs  # unused: the argument is for the convention of nnx modules
        self.scale = nnx.Param(jnp.ones((num_features,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.scale[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, scale.dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x.astype(dtype) * scale.astype(dtype)
