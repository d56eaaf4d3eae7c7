"""Attention and a memory side by side in one layer: the memory as a gate, or as context (arXiv 2501.00663, section 4).

In turns they are a pattern of mixers. The persistent tokens of the paper, learned vectors in front of a sequence, are
not there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.mixers.attention.attend import EMPTY, segments_of
from tttlm.mixers.attention.layer import Attention
from tttlm.mixers.learners.layer import TTT, TTTState
from tttlm.ops.attention import attention
from tttlm.ops.documents import Documents, document_in_progress, documents, num_positions
from tttlm.ops.ttt import Ridge
from tttlm.parts.norm import RMSNorm
from tttlm.parts.partition import to_stream
from tttlm.parts.sequence_layer import LearningLayer


class SegmentCache(NamedTuple):
    """Keys and values of the segment in progress, by position: of the context in front, of the token behind.

    Attributes:
        keys, values: they are rotated by the position within the segment.
        live: which positions have a token of the document in progress.
    """

    keys: Float[Array, "B C 2 G K"]
    values: Float[Array, "B C 2 G K"]
    live: Bool[Array, "B C"]


class HybridState(NamedTuple):
    """The states of both; the attention's is an `AttentionState`, or a `SegmentCache` where the memory is context."""

    memory: TTTState
    attention: Any

    @property
    def document(self) -> Int[Array, "*B"]:
        """The id of the document in progress; in a stack of layers, of each layer."""
        return self.memory.document


class _Hybrid(LearningLayer[HybridState]):
    def __init__(self, memory: TTT, attention: Attention, *, norm_eps: float = 1e-6):
        if memory.hidden_size != attention.hidden_size or not attention.causal:
            raise InputError(
                "memory and attention of one layer must have the same hidden_size, and the attention be causal; "
                f"got {memory.hidden_size} and {attention.hidden_size}, causal {attention.causal}"
            )
        self.memory, self.attention = memory, attention
        self.hidden_size, self.precision = memory.hidden_size, memory.precision
        self.dtype, self.param_dtype = memory.dtype, memory.param_dtype

        def norm() -> RMSNorm:
            dtypes: Any = {"dtype": memory.dtype, "param_dtype": memory.param_dtype, "rngs": nnx.Rngs(0)}
            return RMSNorm(memory.hidden_size, eps=norm_eps, **dtypes)

        self.attention_norm, self.memory_norm = norm(), norm()

    def _gated(self, y: Float[Array, "B T D"], memory: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The paper's `⊗`: both normalised with learned scales, the memory's output through a sigmoid."""
        return self.attention_norm(y) * jax.nn.sigmoid(self.memory_norm(memory))


class MemoryAsGate(_Hybrid):
    """`o = norm(Attn(x)) σ(norm(M(x)))`: attention over a window, gated by a memory (arXiv 2501.00663, eq. 26-28).

    >>> memory, window = Titans(64, 4, rngs=rngs), Attention(64, 4, sliding_window=16, rngs=rngs)
    >>> layer = MemoryAsGate(memory, window)

    Args:
        memory: the layer of any learner; dtypes and precision of the hybrid are its own.
        attention: the attention beside it.
        norm_eps: epsilon of the norms of their outputs.

    Raises:
        InputError: the two do not fit together.
    """

    def _init_state(self, batch: int) -> HybridState:
        return HybridState(self.memory._init_state(batch), self.attention._init_state(batch))

    def _inner_statistics(self, x, segment_ids, multiplier):
        return self.memory._inner_statistics(x, segment_ids, multiplier)

    def _whole(self, *arguments: Any, **options: Any) -> Array:
        x, docs = arguments
        y = self.attention._whole(x, docs, positions=None, attention_mask=None)
        return self._gated(y, self.memory._whole(x, docs, **options))

    def _extend(
        self, x: Float[Array, "B T D"], state: HybridState, docs: Documents | None, **options: Any
    ) -> tuple[Float[Array, "B T D"], HybridState]:
        y, cache = self.attention._extend(x, state.attention, docs, positions=None)
        read, memory = self.memory._extend(x, state.memory, docs, **options)
        return self._gated(y, read), HybridState(memory, cache)


class MemoryAsContext(_Hybrid):
    """Attention to the segment, and to what the memory of the segments before recalls (arXiv 2501.00663).

    A segment is a chunk of the memory, from whose first weights `W*` every token recalls `h_t = f(q_t; W*)`. Token `t`
    attends to `h_s` and `x_s` of its segment and document up to itself, `s <= t`; its output `y_t` is what the memory
    learns from and is read with: `o_t = norm(y_t) σ(norm(M_t(y_t)))`. `M_t` has learned from the tokens up to `t`: the
    paper (equations 21 to 25) reads with the weights after the complete segment, which a causal model cannot know.

    >>> memory, inside = Titans(64, 4, TitansConfig(chunk_size=16), rngs=rngs), Attention(64, 4, rngs=rngs)
    >>> layer = MemoryAsContext(memory, inside)

    Args:
        memory: a layer of one learner that takes gradients at the start of a chunk and is read at once.
        attention: the attention, whose own window and cache are not used.
        norm_eps: epsilon of the norms of their outputs.

    Raises:
        InputError: the two do not fit together, or the memory is of another kind.
    """

    def __init__(self, memory: TTT, attention: Attention, *, norm_eps: float = 1e-6):
        super().__init__(memory, attention, norm_eps=norm_eps)
        learner = memory.memories[0].learner
        clocks, ridge = learner.clocks, isinstance(learner.optimizer, Ridge)
        plain = clocks.step == clocks.writes_per_token == 1 and learner.query_projection is None and not ridge
        if len(memory.memories) > 1 or clocks.anchor is None or not plain or learner.link or memory.skip:
            raise InputError(
                "a memory as context must be of one learner without link, skip or query projection, that steps at "
                f"every token from an anchor, as that of Titans; got {learner}"
            )
        self.segment_size = clocks.anchor

    def _init_state(self, batch: int) -> HybridState:
        heads, size, dtype = self.attention.num_kv_heads, self.attention.head_dim, self.dtype or self.param_dtype
        empty = lambda: jnp.zeros((batch, self.segment_size, 2, heads, size), dtype)
        cache = SegmentCache(empty(), empty(), jnp.zeros((batch, self.segment_size), bool))
        return HybridState(self.memory._init_state(batch), cache)

    def _inner_statistics(self, x, segment_ids, multiplier):
        options: Any = {"multiplier": multiplier, "on_boundary": True}
        (_, y), _ = self._segments(x, self._init_state(x.shape[0]), documents(segment_ids), **options)
        return self.memory._inner_statistics(y, segment_ids, multiplier)  # the memory reads what the attention gives

    def _whole(self, *arguments: Any, **options: Any) -> Array:
        x, docs = arguments
        return self._segments(x, self._init_state(x.shape[0]), docs, on_boundary=True, **options)[0][0]

    def _extend(
        self, x: Float[Array, "B T D"], state: HybridState, docs: Documents | None, **options: Any
    ) -> tuple[Float[Array, "B T D"], HybridState]:
        (out, _), after = self._segments(x, state, docs, **options)
        return out, after

    def _segments(self, x, state, docs, *, multiplier, on_boundary=False):
        """The outputs and those of the attention, segment by segment, and the next state.

        Sequences can be at different positions of their segments: the n-th turn has of each the tokens of its n-th.
        """
        (batch, time, _), size = x.shape, self.segment_size
        turns = -(-(time + (0 if on_boundary else size - 1)) // size)
        segment = partial(self._segment, multiplier=multiplier, on_boundary=on_boundary)
        if turns == 1:
            return segment(x, state, docs)

        def carried(results, after):  # in the dtypes of the state
            return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), results

        if docs is None and on_boundary and time == turns * size:
            pieces = jnp.moveaxis(x.reshape(batch, turns, size, -1), 1, 0)
            turn = jax.checkpoint(lambda state, piece: carried(*segment(piece, state, None)))
            after, results = jax.lax.scan(turn, state, pieces)
            return tuple(jnp.moveaxis(a, 0, 1).reshape(x.shape) for a in results), after

        if docs is None:
            document = document_in_progress(state.document, None)
            docs = documents(jnp.broadcast_to(document[:, None], (batch, time)), state.document)
        offset = jnp.zeros((batch,), jnp.int32) if on_boundary else state.memory.inner[0].offset
        start = jnp.arange(turns, dtype=jnp.int32)[:, None] * size - offset  # [N, B]
        first = jnp.clip(start, 0, time)
        count = jnp.clip(jnp.minimum(start + size, num_positions(docs, time)) - first, 0, size)

        @jax.checkpoint
        def ragged(state, given):
            first, count = (a[:, None] for a in given)
            place = jnp.arange(size, dtype=jnp.int32)
            here, token = place < count, jnp.minimum(first + place, time - 1)
            last = first + jnp.minimum(place, count - 1)  # after the tokens, the document in progress
            at = lambda a, where: jnp.take_along_axis(a, jnp.clip(where, 0, time - 1), axis=1)
            index, before = (jnp.where(t < 0, 0, at(docs.index, t)) for t in (last, first - 1))
            real, start = (at(a, token) & here for a in (docs.real, docs.start))
            piece = jnp.where(here[..., None], jnp.take_along_axis(x, token[..., None], axis=1), 0)
            return carried(*segment(piece, state, Documents(index - before, real, start, docs.last, count[:, 0])))

        after, results = jax.lax.scan(ragged, state, (first, count))
        position = offset[:, None] + jnp.arange(time)  # of every token, from the start of its first segment
        back = position - jnp.where(position < size, offset[:, None], 0)
        flat = (jnp.moveaxis(a, 0, 1).reshape(batch, turns * size, -1) for a in results)
        return tuple(jnp.take_along_axis(a, back[..., None], axis=1) for a in flat), after

    def _segment(self, x, state, docs, *, multiplier, on_boundary):
        """The same for tokens that are in one segment of each sequence."""
        (batch, time, _), (memory, cache) = x.shape, state
        offset = memory.inner[0].offset
        position = offset[:, None] + jnp.arange(time, dtype=jnp.int32)
        segments = segments_of(docs, (batch, time))
        q, k, v = self.attention._project(x, position)
        _, *of_context = self.attention._project(self._context(x, memory, docs), position)
        live = cache.live & (offset > 0)[:, None]
        latest = jnp.zeros((batch, 1), jnp.int32) if docs is None else docs.last_index[:, None]

        def put(old: Array, new: Array) -> Array:
            return old.at[jnp.arange(batch)[:, None], position].set(new.astype(old.dtype), mode="drop")

        keys, values = (
            put(old, jnp.stack(new, axis=2))
            for old, new in zip(cache[:2], zip(of_context, (k, v), strict=True), strict=True)
        )
        twice = lambda a: jnp.repeat(a, 2, axis=1)
        y = attention(
            q,
            keys.reshape(batch, -1, *keys.shape[3:]),
            values.reshape(batch, -1, *values.shape[3:]),
            query_positions=position,
            key_positions=twice(jnp.arange(self.segment_size, dtype=jnp.int32)[None]),
            query_segments=segments,
            key_segments=twice(put(jnp.where(live, 0, EMPTY), segments)),
        )
        y = self.attention.o_proj(to_stream(y.reshape(batch, time, -1)))
        if docs is not None:
            y = jnp.where(docs.real[..., None], y, 0)
        after = SegmentCache(keys, values, put(live & (latest == 0), segments == latest))
        read, memory = self.memory._extend(y, memory, docs, multiplier=multiplier, on_boundary=on_boundary)
        return (self._gated(y, read), y), HybridState(memory, after)

    def _context(self, x, state, docs):
        """What the memory recalls for every token: of its own document, the first has the initial weights."""
        memory, conventions, inner = self.memory.memories[0], self.memory.conventions, state.inner[0]
        q = self.memory.q_proj(x).reshape(*x.shape[:2], self.memory.num_heads, -1)
        for function in (conventions.activation, conventions.feature_map):
            q = q if function is None else function(q)
        of_heads = jax.vmap(memory.learner.model)
        of_tokens = lambda of_weights: jax.vmap(jax.vmap(of_heads, (None, None, 0)), (of_weights, None, 0))
        carried = inner.weights if inner.anchor is None else inner.anchor
        read = of_tokens(0)(carried, memory.slow_parameters, memory.learner.query_scale * q)
        if docs is not None:
            first = of_tokens(None)(memory.weights, memory.slow_parameters, memory.learner.query_scale * q)
            read = jnp.where((docs.index == 0)[..., None, None], read, first.astype(read.dtype))
        return self.memory._output(x, None, read.astype(x.dtype))
