"""The attention mask that every implementation follows."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    query_segments: Int[Array, "#B T"] | None,
    key_segments: Int[Array, "#B S"] | None,
    sliding_window: int | None,
) -> Bool[Array, "#B T S"]:
    """True where a query attends to a key: in its segment, not after it, and within the window if there is one."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen


def masked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    seen: Bool[Array, "#B T S"],
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T H K"]:
    """JAX's attention with a dense mask; a query without keys gives zeros, where JAX gives the mean of all values."""
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=implementation)
    return jnp.where(jnp.any(seen, axis=2)[..., None, None], out, 0)
