"""Attention of queries to keys and values that are projected and rotated: of whole sequences, and from a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.ops.attention import attention
from tttlm.ops.attention.mask import masked_attention, visible
from tttlm.ops.documents import Documents, document_in_progress, num_positions
from tttlm.parts.partition import each_device, repeat_groups, with_sharding

PADDING, EMPTY = -1, -2  # segments of padding and of unused slots of the cache


class AttentionState(NamedTuple):
    """The cache, with `max_length` slots or, with a window, as many as the window.

    Attributes:
        keys, values: keys (rotated) and values of the tokens so far. The token at position `t` of the sequence is in
            slot `t`, or in slot `t % window`.
        live: which slots have a token of the document in progress.
        offset: number of positions so far.
        document: id of the document in progress.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    live: Bool[Array, "B S"]
    offset: Int[Array, "B"]
    document: Int[Array, "B"]


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    docs: Documents | None,
    *,
    sliding_window: int | None,
    causal: bool = True,
    attention_mask: Bool[Array, "B T T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Attention of complete sequences, each device on its own heads; arguments as for `Attention`."""
    (batch, time), num_heads = q.shape[:2], q.shape[2]
    segments = None if docs is None else segments_of(docs, (batch, time))

    # Where all stand at one position, nothing is after anything.
    here = None if causal else jnp.zeros((1, time), jnp.int32)

    def of_device(q, k, v, segments, allowed):
        if allowed is not None:
            order = jnp.arange(time, dtype=jnp.int32)[None] if here is None else here
            seen = allowed & visible(order, order, segments, segments, sliding_window)
            return masked_attention(q, k, v, seen)
        return attention(
            q,
            k,
            v,
            sliding_window=sliding_window,
            query_positions=here,
            key_positions=here,
            query_segments=segments,
            key_segments=segments,
            implementation=implementation,
        )

    k, v = repeat_groups(k, num_heads), repeat_groups(v, num_heads)
    q, k, v = (with_sharding(a, "B_H") for a in (q, k, v))
    return each_device(of_device, ("B_H", "B_H", "B_H", "B", "B"), "B_H")(q, k, v, segments, attention_mask)


def empty_cache(shape: tuple[int, int, int, int], dtype: Dtype) -> AttentionState:
    """A cache `[B, S, G, K]` before the first token."""
    count = lambda: jnp.zeros(shape[:1], jnp.int32)  # leaves of their own, so that a state can be donated
    return AttentionState(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], bool), count(), count()
    )


def beyond(state: AttentionState, docs: Documents | None, time: int) -> Bool[Array, "B T"]:
    """The tokens for which a cache without a window has no slot."""
    order, taken = jnp.arange(time, dtype=jnp.int32), num_positions(docs, time)
    found = state.offset[:, None] + order >= state.keys.shape[1]
    return found if isinstance(taken, int) else found & (order < taken[:, None])


def attend_cached(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    state: AttentionState,
    docs: Documents | None,
    *,
    sliding_window: int | None,
) -> tuple[Float[Array, "B T H K"], AttentionState]:
    """Attention of the next tokens to themselves and to the cache, and the next cache."""
    (batch, time), slots = q.shape[:2], state.keys.shape[1]
    taken = num_positions(docs, time)
    segments = segments_of(docs, (batch, time))
    order = state.offset[:, None] + jnp.arange(time, dtype=jnp.int32)

    # Without a window every token has its own slot, and there is none past the last. With one, tokens take turns.
    first = max(0, time - slots) if isinstance(taken, int) and sliding_window is not None else 0
    slot = order[:, first:] if sliding_window is None else order[:, first:] % slots
    if not isinstance(taken, int):  # padding goes to no slot, nor does what a window forgets
        back = taken[:, None] - jnp.arange(time, dtype=jnp.int32)  # 1 for the last token, 0 behind it
        kept = (back > 0) & ((back <= slots) | (sliding_window is None))
        slot = jnp.where(kept[:, first:], slot, slots)

    def put(cache: Array, new: Array) -> Array:
        return cache.at[jnp.arange(batch)[:, None], slot].set(new[:, first:].astype(cache.dtype), mode="drop")

    latest = jnp.zeros((batch, 1), jnp.int32) if docs is None else docs.last_index[:, None]
    after = AttentionState(
        keys=put(state.keys, k),
        values=put(state.values, v),
        live=put(state.live & (latest == 0), segments == latest),
        offset=state.offset + taken,
        document=document_in_progress(state.document, docs),
    )
    cached = jnp.where(state.live, 0, EMPTY)
    if sliding_window is None or time == 1:  # nothing that a query of this call sees has been overwritten
        keys, values, key_segments = after.keys, after.values, put(cached, segments)
        key_places = _places(after.offset, slots, sliding_window)
    else:
        keys, values = (
            jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in ((state.keys, k), (state.values, v))
        )
        key_segments = jnp.concatenate([cached, segments], axis=1)
        key_places = jnp.concatenate([_places(state.offset, slots, sliding_window), order], axis=1)
    y = attention(
        q,
        keys,
        values,
        sliding_window=sliding_window,
        query_positions=order,
        key_positions=key_places,
        query_segments=segments,
        key_segments=key_segments,
    )
    return y, after


def _places(offset: Int[Array, "B"], slots: int, sliding_window: int | None) -> Int[Array, "B S"]:
    """The position of each slot's token in the sequence; negative for an empty slot."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    if sliding_window is None:
        return jnp.broadcast_to(slot, (offset.shape[0], slots))
    last = offset[:, None] - 1
    return last - (last - slot) % slots


def segments_of(docs: Documents | None, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Segments for `attention`: 0 for the document carried in, then 1, 2, ..., and `PADDING`."""
    if docs is None:
        return jnp.zeros(shape, jnp.int32)
    return jnp.where(docs.real, docs.index, PADDING)


def check_room(state: AttentionState, time: int | Int[Array, "B"]) -> None:
    """Refuses `time` more tokens if they do not fit in the cache of a layer without a window, or of a stack of them.

    Raises:
        InputError: they do not fit. Within `jax.jit`, where offsets are unknown, nothing is raised.
    """
    wanted, slots = state.offset + time, state.keys.shape[-3]
    if not isinstance(wanted, jax.core.Tracer):
        most = int(jnp.max(wanted, initial=0))
        if most > slots:
            raise InputError(f"the attention cache has room for {slots} tokens, got {most}: raise max_length")
