"""Causal self-attention: a sequence layer whose state is a cache of what it has seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.layers.norm import RMSNorm
from tttlm.layers.partition import each_device, place, share_groups, to_stream
from tttlm.ops.attention import attention
from tttlm.ops.documents import Documents, document_in_progress, documents
from tttlm.ops.projection import projection
from tttlm.ops.rope import rotate_halves

default_kernel_init = nnx.initializers.normal(0.02)  # of the released Llama models

PADDING, EMPTY = -1, -2  # segments that no token of a document is of: of padding, and of unused slots of the cache


class AttentionState(NamedTuple):
    """The cache: as many slots as the layer has room for or, with a window, as the window is long.

    Attributes:
        keys, values: of the tokens seen, keys rotated. The token at place `t` of the row is in slot `t`, or in slot
            `t % window`.
        live: which slots hold a token of the document in progress.
        offset: tokens seen.
        document: id of the document in progress.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    live: Bool[Array, "B S"]
    offset: Int[Array, "B"]
    document: Int[Array, "B"]


class Attention(nnx.Module):
    """Causal attention with rotary positions in the layout of Llama checkpoints (arXiv 2302.13971).

    >>> layer = Attention(64, 4, kv_heads=2, window=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    Args:
        width: model width `D`.
        heads: heads `H` of queries.
        kv_heads: heads `G` of keys and values (arXiv 2305.13245); None for `H`.
        head_width: width `K` of a head, even; None for `D / H`.
        window: tokens that a query sees, itself included; None for all before it.
        max_length: tokens that the cache of a layer without a window has room for. Beyond it `extend` raises, or
            where it is compiled, and offsets are not known, gives NaN. Not needed to call the layer on a whole row.
        qk_norm: RMSNorm over every head's query and key before they are rotated (arXiv 2302.05442).
        rope_base: base of the rotary embedding.
        use_bias: of the four projections.
        dtype: what is computed in, and what the cache holds; None promotes input and parameters. Scores and softmax
            are float32 at least.
        param_dtype: of all parameters.
        kernel_init: of the projections.
        implementation: of `tttlm.ops.attention.attention`, when called on a whole row.
        rngs: for the parameters.

    Raises:
        ValueError: when heads, widths or window do not fit together.

    A token costs projections of `D x K (2 H + 2 G)`, and `2 x K H` for every token that it sees.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        window: int | None = None,
        max_length: int | None = None,
        qk_norm: bool = False,
        rope_base: float = 10_000.0,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide the heads; got {heads} heads and {kv_heads} kv_heads")
        if head_width is None:
            if width % heads:
                raise ValueError(f"heads must divide the width or head_width be given; got {width} and {heads} heads")
            head_width = width // heads
        if head_width % 2:
            raise ValueError(f"head_width must be even, which rotary embeddings turn in pairs; got {head_width}")
        if window is not None and window < 1:
            raise ValueError(f"a window holds at least 1 token; got {window}")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.window, self.max_length, self.rope_base = window, max_length, rope_base
        self.dtype, self.param_dtype = dtype, param_dtype
        self.implementation = implementation

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=projection,
                rngs=rngs,
            )

        def norm() -> RMSNorm | None:
            return RMSNorm(head_width, dtype=dtype, param_dtype=param_dtype, rngs=rngs) if qk_norm else None

        self.q_proj = linear(width, heads * head_width)
        self.k_proj = linear(width, kv_heads * head_width)
        self.v_proj = linear(width, kv_heads * head_width)
        self.o_proj = linear(heads * head_width, width)
        self.q_norm, self.k_norm = norm(), norm()

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """The layer on whole rows; `segment_ids` tells their documents apart (see `tttlm.ops.documents`)."""
        batch, time = x.shape[:2]
        q, k, v = self._project(x, jnp.arange(time, dtype=jnp.int32))
        segments = None
        if segment_ids is not None:
            segments = _segments(documents(segment_ids, jnp.zeros((batch,), jnp.int32)), (batch, time))

        def attend(q, k, v, segments):
            return attention(
                q,
                k,
                v,
                window=self.window,
                query_segments=segments,
                key_segments=segments,
                implementation=self.implementation,
            )

        q, k, v = (place(a, "B_H") for a in (q, share_groups(k, self.heads), share_groups(v, self.heads)))
        y = each_device(attend, ("B_H", "B_H", "B_H", "B"), "B_H")(q, k, v, segments)
        return self.o_proj(to_stream(y.reshape(batch, time, -1)))

    def extend(
        self, x: Float[Array, "B T D"], state: AttentionState, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Goes on from `state` and returns the next one; however a sequence is cut, the outputs are the same.

        Raises:
            ValueError: when the cache has no room for `T` more tokens, and the offsets are known.
        """
        (batch, time), slots = x.shape[:2], state.keys.shape[1]
        if self.window is None:
            check_room(state, time)
        docs = None if segment_ids is None else documents(segment_ids, state.document)
        segments = _segments(docs, (batch, time))
        places = state.offset[:, None] + jnp.arange(time, dtype=jnp.int32)
        q, k, v = self._project(x, places)

        # Without a window every token has its own slot, and there is none past the last. With one, tokens take turns.
        first = 0 if self.window is None else max(0, time - slots)
        slot = places[:, first:] if self.window is None else places[:, first:] % slots

        def put(cache: Array, new: Array) -> Array:
            return cache.at[jnp.arange(batch)[:, None], slot].set(new[:, first:].astype(cache.dtype), mode="drop")

        latest = jnp.zeros((batch, 1), jnp.int32) if docs is None else docs.last_index[:, None]
        after = AttentionState(
            keys=put(state.keys, k),
            values=put(state.values, v),
            live=put(state.live & (latest == 0), segments == latest),
            offset=state.offset + time,
            document=document_in_progress(state.document, docs),
        )
        cached = jnp.where(state.live, 0, EMPTY)
        if self.window is None or time == 1:  # nothing that a query of this call sees has been overwritten
            keys, values, key_segments = after.keys, after.values, put(cached, segments)
            key_places = self._places(after.offset, slots)
        else:
            keys, values = (
                jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in ((state.keys, k), (state.values, v))
            )
            key_segments = jnp.concatenate([cached, segments], axis=1)
            key_places = jnp.concatenate([self._places(state.offset, slots), places], axis=1)
        y = attention(
            q,
            keys,
            values,
            window=self.window,
            query_positions=places,
            key_positions=key_places,
            query_segments=segments,
            key_segments=key_segments,
        )
        y = self.o_proj(y.reshape(batch, time, -1))
        if self.window is None:
            y = jnp.where((places < slots)[..., None], y, jnp.nan)  # rather than silently wrong
        return y, after

    def init_state(self, batch: int) -> AttentionState:
        """The state before the first token, for `batch` rows.

        Raises:
            ValueError: when the layer has neither a window nor a `max_length`.
        """
        slots = self.max_length if self.window is None else self.window
        if slots is None:
            raise ValueError("attention without a window needs max_length, the tokens its cache has room for; got None")
        shape = (batch, slots, self.kv_heads, self.head_width)
        dtype = self.dtype or self.param_dtype
        count = jnp.zeros((batch,), jnp.int32)
        return AttentionState(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], bool), count, count
        )

    def _project(
        self, x: Float[Array, "B T D"], places: Int[Array, "*B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        q, k, v = (
            place(proj(x), "BTF").reshape(*x.shape[:2], -1, self.head_width)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_halves(a, places, self.rope_base).astype(v.dtype) for a in (q, k))
        return q, k, v

    def _places(self, offset: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
        """Where in the row the token of each slot stands; negative before there was one."""
        slot = jnp.arange(slots, dtype=jnp.int32)
        if self.window is None:
            return jnp.broadcast_to(slot, (offset.shape[0], slots))
        last = offset[:, None] - 1
        return last - (last - slot) % slots


def _segments(docs: Documents | None, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """What `attention` tells documents apart by: 0 for the one carried in, then 1, 2, ..., and `PADDING`."""
    if docs is None:
        return jnp.zeros(shape, jnp.int32)
    return jnp.where(docs.real, docs.index, PADDING)


def check_room(state: AttentionState, time: int) -> None:
    """Refuses `time` more tokens than the cache of a layer without a window, or of a stack of them, has room for.

    Raises:
        InputError: the offsets are known, which they are not where a caller is compiled, and there is no room.
    """
    if not isinstance(state.offset, jax.core.Tracer):
        wanted, slots = int(jnp.max(state.offset)) + time, state.keys.shape[-3]
        if wanted > slots:
            raise InputError(f"the attention cache has room for {slots} tokens, {wanted} are wanted: raise max_length")
