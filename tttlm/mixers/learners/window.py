"""Attention over a window with the queries, keys and values of a memory, as in LaCT's blocks (arXiv 2505.23884)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tttlm.errors import InputError
from tttlm.mixers.attention.attend import attend, attend_cached, empty_cache
from tttlm.mixers.learners.hybrids import HybridState
from tttlm.mixers.learners.layer import TTT, TTTState
from tttlm.ops.documents import Documents, documents
from tttlm.parts.norm import RMSNorm
from tttlm.parts.partition import to_stream
from tttlm.parts.sequence_layer import LearningLayer, at_least_one


class SharedWindow(LearningLayer[HybridState]):
    """`(Attn(q, k, v) + M(s ∘ q + o, s' ∘ k + o', v)) W_o`: one set of projections for window attention and memory.

    Every channel of the memory's queries and keys has a learned scale `s` and offset `o`, as in the public code.

    >>> layer = SharedWindow(LaCT(64, 4, rngs=rngs), sliding_window=16)

    Args:
        memory: a layer of one write a token with rotary embeddings, whose keys and values have the same size; dtypes
            and precision are its own.
        sliding_window: number of tokens that a query attends to, including itself.
        qk_norm: whether queries and keys have an RMSNorm over all heads, which the memory reads too.
        norm_eps: epsilon of those norms.

    Raises:
        InputError: the memory is of another kind, or the window below 1.
    """

    def __init__(self, memory: TTT, *, sliding_window: int, qk_norm: bool = False, norm_eps: float = 1e-6):
        at_least_one(sliding_window=sliding_window)
        if memory.writes_per_token > 1 or memory.head_dim != memory.value_dim or not memory.conventions.rope_theta:
            raise InputError(
                "a memory that shares its projections must have rotary embeddings, one write a token, and "
                f"keys of the size of its values; got rope_theta {memory.conventions.rope_theta}, "
                f"{memory.writes_per_token} writes, sizes {memory.head_dim} and {memory.value_dim}"
            )
        self.memory, self.sliding_window = memory, sliding_window
        self.hidden_size, self.precision = memory.hidden_size, memory.precision
        self.dtype, self.param_dtype = dtype, param_dtype = memory.dtype, memory.param_dtype
        size = memory.num_heads * memory.head_dim
        self.head_dim = memory.conventions.rope_dim or memory.head_dim
        if memory.head_dim % self.head_dim:
            raise InputError(f"rope_dim must divide head_dim; got rope_dim {self.head_dim} and {memory.head_dim}")

        def norm() -> RMSNorm | None:
            dtypes: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
            return RMSNorm(size, eps=norm_eps, **dtypes) if qk_norm else None

        self.q_norm, self.k_norm = norm(), norm()
        self.qk_scale = nnx.Param(jnp.ones((2, size), param_dtype))
        self.qk_offset = nnx.Param(jnp.zeros((2, size), param_dtype))

    def _init_state(self, batch: int) -> HybridState:
        heads = self.qk_scale.shape[1] // self.head_dim
        cache = empty_cache((batch, self.sliding_window, heads, self.head_dim), self.dtype or self.param_dtype)
        return HybridState(self.memory._init_state(batch), cache)

    def _inner_statistics(self, x, segment_ids, multiplier):
        _, tokens, _, _ = self._shared(x, None, documents(segment_ids))
        return self.memory._statistics(x, tokens, segment_ids, multiplier)

    def _shared(self, x, state, docs):
        """Queries, keys and values of the attention, what tokens bring to the memory, its next tails and position."""
        memory, read = self.memory, None if state is None else state.memory
        (q, k, v), tails = memory._projected(x, read, docs)
        positions, position = memory._positions(read, docs, None, x.shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        scale, offset = self.qk_scale[...].astype(q.dtype), self.qk_offset[...].astype(q.dtype)
        tokens = memory._of_projected((q * scale[0] + offset[0], k * scale[1] + offset[1], v), positions)
        q, k, v = (a.reshape(*a.shape[:2], -1, self.head_dim) for a in (q, k, v))
        return (memory._rotated(q, positions), memory._rotated(k, positions), v), tokens, tails, position

    def _extend(
        self,
        x: Float[Array, "B T D"],
        state: HybridState | None,
        docs: Documents | None,
        *,
        multiplier: Any,
        on_boundary: bool = False,
    ) -> tuple[Float[Array, "B T D"], HybridState]:
        memory, window, cache = self.memory, self.sliding_window, None
        (q, k, v), tokens, tails, position = self._shared(x, state, docs)
        if state is None:
            seen = attend(q, k, v, docs, sliding_window=window)
        else:
            seen, cache = attend_cached(q, k, v, state.attention, docs, sliding_window=window)
        read = None if state is None else state.memory
        y, inner = memory._learned(x, tokens, read, docs, multiplier=multiplier, on_boundary=on_boundary)
        y = memory._gated(x, tokens, y)
        after = HybridState(TTTState(inner, tails, position), cache)
        return memory.o_proj(to_stream(y + seen.reshape(y.shape))), after
