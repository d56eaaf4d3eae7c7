"""The definition of attention: all scores at once, so memory grows with queries times keys."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.attention.mask import visible


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    sliding_window: int | None,
) -> Float[Array, "B T H K"]:
    """See `tttlm.ops.attention.attention`."""
    batch, time, num_heads, head_dim = q.shape
    groups = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, time, groups, num_heads // groups, head_dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=accumulate)
    seen = visible(query_positions, key_positions, query_segments, key_segments, sliding_window)[:, None, None]
    scores = jnp.where(seen, scores / math.sqrt(head_dim), jnp.finfo(accumulate).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, weights, 0)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(accumulate).tiny)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v, preferred_element_type=accumulate)
    return out.reshape(q.shape).astype(q.dtype)
