"""Causal self-attention: a sequence layer whose state is a cache of keys and values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.mixers.attention.attend import AttentionState, attend, attend_cached, beyond, check_room, empty_cache
from tttlm.ops.attention import IMPLEMENTATIONS
from tttlm.ops.documents import Documents, num_positions
from tttlm.ops.projection import projection
from tttlm.ops.rope import RopeScaling, rotate_halves
from tttlm.parts.norm import RMSNorm
from tttlm.parts.partition import to_stream, with_sharding
from tttlm.parts.sequence_layer import (
    Precision,
    SequenceLayer,
    at_least_one,
    check_implementation,
    checked_positions,
    checked_precision,
)

default_kernel_init = nnx.initializers.normal(0.02)  # of the released Llama models


class Attention(SequenceLayer[AttentionState]):
    """Causal attention with rotary positions in the layout of Llama checkpoints (arXiv 2302.13971).

    >>> layer = Attention(64, 4, num_kv_heads=2, sliding_window=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    Args:
        hidden_size: size `D` of inputs and outputs.
        num_heads: number of heads `H` of queries.
        num_kv_heads: number of heads `G` of keys and values (arXiv 2305.13245); None for `H`.
        head_dim: size `K` of a head, even; None for `D / H`.
        sliding_window: number of tokens that a query attends to, including itself; None for all before it.
        max_length: length in tokens of the cache of a layer without a window. Beyond it `extend` raises or, within
            `jax.jit`, where offsets are unknown, gives NaN. Not needed to call the layer on complete sequences.
        qk_norm: whether every head's query and key has an RMSNorm before it is rotated (arXiv 2302.05442).
        norm_eps: epsilon of those norms.
        causal: whether a query attends only to tokens that are not after it; otherwise to all of its document, and
            there is no `extend`.
        rope_theta: base of the rotary embedding; None for no rotation.
        rope_scaling: the RoPE scaling of Llama 3; None for no scaling.
        use_bias: whether the four projections have biases.
        out_bias: whether the projection out has a bias; None for `use_bias`.
        dtype: dtype of the computation and of the cache; None promotes input and parameters. Scores and softmax
            are float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of the projections.
        implementation: implementation of `tttlm.ops.attention.attention`, for complete sequences.
        rngs: random number generators of the parameters.

    Raises:
        InputError: heads, sizes or window do not fit together, a size is below 1 or the implementation is unknown.

    A token costs projections of `D x K (2 H + 2 G)`, and `2 x K H` for every token that it attends to.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        sliding_window: int | None = None,
        max_length: int | None = None,
        qk_norm: bool = False,
        causal: bool = True,
        norm_eps: float = 1e-6,
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        use_bias: bool = False,
        out_bias: bool | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        at_least_one(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        at_least_one(sliding_window=sliding_window, max_length=max_length)
        check_implementation(implementation, IMPLEMENTATIONS)
        if num_heads % num_kv_heads:
            raise InputError(
                f"num_kv_heads must divide num_heads; got num_heads {num_heads} and num_kv_heads {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise InputError(
                    "num_heads must divide hidden_size or head_dim be given; "
                    f"got hidden_size {hidden_size} and num_heads {num_heads}"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise InputError(
                f"head_dim must be even, because rotary embeddings rotate pairs of channels; got {head_dim}"
            )
        if not causal and sliding_window is not None:
            raise InputError(
                f"sliding_window is for causal attention: with causal=False it must be None, got {sliding_window}"
            )
        self.hidden_size, self.causal = hidden_size, causal
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sliding_window, self.max_length, self.rope_theta = sliding_window, max_length, rope_theta
        self.rope_scaling = rope_scaling
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)
        self.implementation = implementation

        def linear(inputs: int, outputs: int, use_bias: bool = use_bias) -> nnx.Linear:
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
            if not qk_norm:
                return None
            return RMSNorm(head_dim, eps=norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q_proj = linear(hidden_size, num_heads * head_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = linear(num_heads * head_dim, hidden_size, use_bias if out_bias is None else out_bias)
        self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        attention_mask: Bool[Array, "*M T T"] | None = None,
    ) -> Float[Array, "*B T D"]:
        """The layer on complete sequences.

        Args:
            x: The sequences, with any leading dimensions.
            segment_ids: Ids of the documents in a sequence, 0 for padding that counts as a position (see
                `tttlm.ops.documents`).
            lengths: Number of tokens of each sequence. Padding after them is neither read nor written and does not
                count as a position: every sequence has the outputs that it has alone. Outputs at padding are 0.
            mask: The same for padding anywhere, True at tokens.
            positions: Positions by which queries and keys are rotated; None counts the tokens. They do not change what
                a query attends to.
            attention_mask: True where a query (first axis) may attend to a key (second axis), for all sequences or for
                each; None for no further restriction than those of causality, window, documents and padding. A query
                that may attend to nothing gives the bias of the projection out. Takes memory of `T x T` for every
                head, and has a softmax in float32.

        Raises:
            InputError: An argument has a wrong shape or dtype.
        """
        pairs = {"attention_mask": self._checked_pairs(x, attention_mask)}
        return self._read(
            x, None, segment_ids, lengths, mask, per_token={"positions": checked_positions(positions)}, per_pair=pairs
        )[0]

    def _checked_pairs(self, x: Array, attention_mask: Any) -> Array | None:
        """The attention mask of each sequence."""
        if attention_mask is None:
            return None
        allowed, time = jnp.asarray(attention_mask), x.shape[-2]
        if allowed.dtype != jnp.bool_:
            raise InputError(
                f"attention_mask must be booleans, True where a query attends to a key; got {allowed.dtype}"
            )
        return jnp.broadcast_to(allowed, (*x.shape[:-1], time)) if allowed.shape == (time, time) else allowed

    def _whole(
        self,
        x: Float[Array, "B T D"],
        docs: Documents | None,
        *,
        positions: Int[Array, "B T"] | None,
        attention_mask: Bool[Array, "B T T"] | None,
    ) -> Float[Array, "B T D"]:
        batch, time = x.shape[:2]
        q, k, v = self._project(x, jnp.arange(time, dtype=jnp.int32) if positions is None else positions)
        y = attend(
            q,
            k,
            v,
            docs,
            sliding_window=self.sliding_window,
            causal=self.causal,
            attention_mask=attention_mask,
            implementation=self.implementation,
        )
        return self.o_proj(to_stream(y.reshape(batch, time, -1)))

    def extend(
        self,
        x: Float[Array, "*B T D"],
        state: AttentionState,
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T D"], AttentionState]:
        """Continues from `state` and returns the next one; however a sequence is cut, the outputs are the same.

        Arguments are as for a call; there is no `attention_mask`.

        Raises:
            InputError: An argument has a wrong shape or dtype, or the state has another batch size; or `T` more tokens
                do not fit in the cache (unless within `jax.jit`, where offsets are unknown).
        """
        return self._read(x, state, segment_ids, lengths, mask, per_token={"positions": checked_positions(positions)})

    def init_state(self, batch: int | tuple[int, ...]) -> AttentionState:
        """The state before the first token, for `batch` sequences or for leading dimensions of that shape.

        Raises:
            InputError: The layer has neither a window nor a `max_length`.
        """
        return super().init_state(batch)

    def _extend(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState,
        docs: Documents | None,
        *,
        positions: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        batch, time = x.shape[:2]
        if self.sliding_window is None:
            check_room(state, num_positions(docs, time))
        order = state.offset[:, None] + jnp.arange(time, dtype=jnp.int32)
        q, k, v = self._project(x, order if positions is None else positions)
        y, after = attend_cached(q, k, v, state, docs, sliding_window=self.sliding_window)
        y = self.o_proj(y.reshape(batch, time, -1))
        if self.sliding_window is None:
            y = jnp.where(beyond(state, docs, time)[..., None], jnp.nan, y)  # rather than silently wrong
        return y, after

    def _init_state(self, batch: int) -> AttentionState:
        if not self.causal:
            raise InputError(
                "attention with causal=False has no state to continue from: call the layer on complete sequences"
            )
        slots = self.max_length if self.sliding_window is None else self.sliding_window
        if slots is None:
            raise InputError("attention without a window needs max_length, the tokens its cache has room for; got None")
        return empty_cache((batch, slots, self.num_kv_heads, self.head_dim), self.dtype or self.param_dtype)

    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "*B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        q, k, v = (
            with_sharding(proj(x), "BTF").reshape(*x.shape[:2], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = (rotate_halves(a, positions, self.rope_theta, self.rope_scaling).astype(v.dtype) for a in (q, k))
        return q, k, v
