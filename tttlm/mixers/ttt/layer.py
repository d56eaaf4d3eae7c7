"""TTT-Linear and TTT-MLP: sequence layers whose hidden state is a model that learns at test time.

From "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (arXiv 2407.04620). Both are one layer,
for an inner MLP of any depth.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.ops.documents import Documents, documents
from tttlm.ops.projection import projection
from tttlm.ops.rope import rotate_pairs
from tttlm.ops.ttt import (
    IMPLEMENTATIONS,
    InnerLayer,
    InnerNorm,
    Learner,
    LearnerInputs,
    LearnerState,
    init_learner_state,
    learn,
    learner_statistics,
    published,
)
from tttlm.ops.ttt.learner_state import Pending
from tttlm.parts.conv import CausalConv, ConvInit
from tttlm.parts.partition import each_device, to_heads, to_stream
from tttlm.parts.sequence_layer import (
    LearningLayer,
    Precision,
    at_least_one,
    check_implementation,
    checked_positions,
    checked_precision,
)

default_kernel_init = nnx.initializers.normal(0.02)  # of the released models


class TTTState(NamedTuple):
    """The state of a TTT layer: the state of its inner model, and the last inputs of its convolutions.

    Attributes:
        inner: see `tttlm.ops.ttt.LearnerState`; float32 (float64 when computed in it).
        tail: the last inputs of the convolutions of shared queries and keys, `[B, W-1, D]`; None without them.
    """

    inner: LearnerState
    tail: Float[Array, "B P D"] | None

    @property
    def document(self) -> Int[Array, "*B"]:
        """The id of the document in progress; in a stack of layers, of each layer."""
        return self.inner.document


class InnerLinear(nnx.Module):
    """The initial weights of one layer of the inner model, one for every head: kernel `[H, I, O]`, bias `[H, O]`."""

    def __init__(
        self,
        num_heads: int,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, inputs, outputs), param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_heads, outputs), param_dtype)) if use_bias else None


class InnerLayerNorm(nnx.Module):
    """Scale and bias `[H, K]` of the LayerNorm at the end of every head's inner model."""

    def __init__(self, num_heads: int, head_dim: int, *, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((num_heads, head_dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_heads, head_dim), param_dtype))


class MiniBatchTTT(LearningLayer[TTTState]):
    """A TTT layer with an inner MLP of any depth; `TTTLinear` and `TTTMLP` are its two published forms.

    Args:
        hidden_size: size `D` of inputs and outputs.
        num_heads: number of heads `H`; each has an inner model of size `K = D / H`, which must be even.
        inner_hidden: sizes of the inner model's hidden layers; none for a linear inner model.
        mini_batch_size: tokens `M` of one inner step.
        inner_learning_rate: base inner learning rate, multiplied for every token and head by a learned gate in (0, 1).
        inner_norm: whether the inner model has a LayerNorm and a residual; without, it is the MLP alone.
        inner_bias: whether the inner model has biases.
        learned_start: whether the inner model's initial weights are parameters; otherwise they are zero, from which
            only a linear inner model can learn.
        learned_rate: whether the gate of every token and a scale of every position are learned; otherwise the rate is
            `inner_learning_rate / K` for all tokens.
        share_qk: whether queries and keys have one projection, each with its own causal convolution (Mamba backbone).
        gate: whether the output is multiplied by `gelu(g_proj(x))` (Mamba backbone).
        conv_kernel: number of taps of those convolutions.
        conv_init: initialisation of those convolutions, see `tttlm.parts.conv.CausalConv`.
        rope_theta: base of the rotary embedding, which rotates by the position within the mini-batch; None for
            no rotation.
        aligned: asserts that every document starts at a multiple of `mini_batch_size`, which saves the cost of others.
        dtype: dtype of projections, convolutions and norms; None promotes input and parameters. The
            inner model is trained in float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of all projections.
        inner_kernel_init: initialiser of the inner model's kernels; None for `kernel_init`.
        remat_mini_batches: number of mini-batches that the backward pass recomputes at a time (see
            `tttlm.ops.ttt.learn`).
        implementation: name of an implementation of `tttlm.ops.ttt.learn`; None picks.
        rngs: random number generators of the parameters.

    Raises:
        InputError: the heads do not divide the hidden size or have an odd head dimension, an inner model with hidden
            layers would start from zeros, a size is below 1 or the implementation is unknown.

    Linear attention without a normaliser is a linear inner model with `inner_norm`, `inner_bias`, `learned_start` and
    `learned_rate` false and the complete sequence in one mini-batch (arXiv 2407.04620, theorem 1). Table 1 of the paper
    leads from there to TTT-Linear.

    Besides the projections, a token costs every head three products with each inner kernel (for its key, its query
    and the update), one more with all but the first (the gradient passed down), and two with its mini-batch.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        inner_hidden: tuple[int, ...] = (),
        mini_batch_size: int = 16,
        inner_learning_rate: float = 1.0,
        inner_norm: bool = True,
        inner_bias: bool = True,
        learned_start: bool = True,
        learned_rate: bool = True,
        share_qk: bool = False,
        gate: bool = False,
        conv_kernel: int = 4,
        conv_init: ConvInit = "pytorch",
        rope_theta: float | None = 10_000.0,
        aligned: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        inner_kernel_init: Initializer | None = None,
        remat_mini_batches: int = 1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        at_least_one(hidden_size=hidden_size, num_heads=num_heads, mini_batch_size=mini_batch_size)
        at_least_one(conv_kernel=conv_kernel, remat_mini_batches=remat_mini_batches)
        check_implementation(implementation, IMPLEMENTATIONS)
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise InputError(
                "num_heads must divide hidden_size into even head dimensions, "
                f"got hidden_size {hidden_size} and num_heads {num_heads}"
            )
        if inner_hidden and not learned_start:
            raise InputError("an inner model with hidden layers cannot learn from zeros: it needs learned_start")
        head_dim = hidden_size // num_heads
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.mini_batch_size = mini_batch_size
        self.inner_learning_rate = inner_learning_rate
        self.rope_theta, self.aligned = rope_theta, aligned
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)
        self.remat_mini_batches, self.implementation = remat_mini_batches, implementation

        def linear(outputs: int, use_bias: bool = False) -> nnx.Linear:
            return nnx.Linear(
                hidden_size,
                outputs,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=projection,
                rngs=rngs,
            )

        def conv() -> CausalConv:
            return CausalConv(hidden_size, conv_kernel, init=conv_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q_proj = linear(hidden_size)
        self.k_proj = None if share_qk else linear(hidden_size)
        self.conv_q = conv() if share_qk else None
        self.conv_k = conv() if share_qk else None
        self.v_proj = linear(hidden_size)
        self.g_proj = linear(hidden_size) if gate else None
        self.o_proj = linear(hidden_size)
        self.learning_rate = linear(num_heads, use_bias=True) if learned_rate else None
        self.token_scale = nnx.Param(jnp.zeros((mini_batch_size,), param_dtype)) if learned_rate else None

        self.inner_bias = inner_bias
        widths = (head_dim, *inner_hidden, head_dim)
        self.inner = nnx.List(
            InnerLinear(
                num_heads,
                i,
                o,
                use_bias=inner_bias,
                param_dtype=param_dtype,
                kernel_init=inner_kernel_init or kernel_init,
                rngs=rngs,
            )
            for i, o in (pairwise(widths) if learned_start else ())
        )
        self.inner_norm = InnerLayerNorm(num_heads, head_dim, param_dtype=param_dtype) if inner_norm else None
        self.post_norm = nnx.LayerNorm(
            hidden_size, epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "*B T D"]:
        """The layer from its initial state.

        Args:
            x: The sequences, with any leading dimensions.
            segment_ids: Ids of the documents in a sequence, 0 for padding that counts as a position (see
                `tttlm.ops.documents`). A document that starts with a mini-batch has the outputs that it has alone.
            lengths: Number of tokens of each sequence. Padding after them is neither read nor written and does not
                count as a position: every sequence has the outputs that it has alone. Outputs at padding are 0.
            mask: The same for padding anywhere, True at tokens.
            positions: Positions by which queries and keys are rotated; None for those within the mini-batch.
            inner_learning_rate_multiplier: Multiplier of the inner learning rates, for their warm-up in training;
                0 reads the inner model out without learning.

        Raises:
            InputError: An argument has a wrong shape or dtype.
        """
        options = {"multiplier": inner_learning_rate_multiplier}
        per_token = {"positions": checked_positions(positions)}
        return self._read(x, None, segment_ids, lengths, mask, per_token=per_token, **options)[0]

    def extend(
        self,
        x: Float[Array, "*B T D"],
        state: TTTState,
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        on_boundary: bool = False,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "*B T D"], TTTState]:
        """Continues from `state` and returns the next one; however a sequence is cut, the outputs are the same.

        Arguments are as for a call. `on_boundary` asserts that every sequence is at the start of a mini-batch, which
        saves the cost of starting within one. Shapes and dtypes of a state never change.

        Raises:
            InputError: An argument has a wrong shape or dtype, or the state has another batch size.
        """
        options = {"multiplier": inner_learning_rate_multiplier, "on_boundary": on_boundary}
        per_token = {"positions": checked_positions(positions)}
        return self._read(x, state, segment_ids, lengths, mask, per_token=per_token, **options)

    def _init_state(self, batch: int) -> TTTState:
        tail = None
        if self.conv_q is not None:
            tail = self.conv_q.init_tail(batch, self.dtype or self.param_dtype)
        inner = init_learner_state(self.learner, self._inner_weights(), batch, self.head_dim, self.head_dim)
        return TTTState(inner, tail)

    def _inner_statistics(self, x, segment_ids, multiplier):
        (_, k, v, rates, token_scale), _ = self._inner_inputs(x, None, documents(segment_ids), multiplier)
        return learner_statistics(
            self.learner,
            LearnerInputs(k, k, v, rates),
            self._inner_weights(),
            slow=self._inner_norm(),
            position_scale=token_scale,
            segment_ids=segment_ids,
        )

    def _inner_inputs(self, x, state, docs, multiplier, positions=None):
        """Queries, keys, values, learning rates and token scale; and the next tail of the convolutions."""
        batch, time, _ = x.shape
        inner = None if state is None else state.inner
        q, k, tail = self._queries_and_keys(x, None if state is None else state.tail, docs)

        if positions is None:
            positions = jnp.arange(time) if inner is None else jnp.arange(time) + inner.offset[:, None]
            positions = positions % self.mini_batch_size

        def split_heads(a: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
            return a.reshape(batch, time, self.num_heads, self.head_dim)

        q, k = split_heads(q), split_heads(k)
        if self.rope_theta is not None:
            q, k = (rotate_pairs(a, positions, self.rope_theta).astype(a.dtype) for a in (q, k))
        v = split_heads(to_heads(self.v_proj(x)))
        return (q, k, v, *self._rates(x, self.inner_learning_rate * multiplier / self.head_dim)), tail

    def _extend(
        self,
        x: Float[Array, "B T D"],
        state: TTTState | None,
        docs: Documents | None,
        *,
        multiplier: Any,
        positions: Int[Array, "B T"] | None,
        on_boundary: bool = False,
    ) -> tuple[Float[Array, "B T D"], TTTState]:
        (q, k, v, rates, token_scale), tail = self._inner_inputs(x, state, docs, multiplier, positions)
        inner = None if state is None else state.inner

        def scan(q, k, v, rates, token_scale, weights, norm, state, docs):
            return learn(
                self.learner,
                LearnerInputs(q, k, v, rates),
                weights,
                slow=norm,
                position_scale=token_scale,
                state=state,
                segment_ids=docs,
                aligned=self.aligned,
                on_boundary=on_boundary,
                remat_chunks=self.remat_mini_batches,
                implementation=self.implementation,
            )

        pending: Any = Pending("BH", None, None, None)  # type: ignore[arg-type]
        of_state: Any = LearnerState("BH", None, None, pending, None, None, "B", "B")  # type: ignore[arg-type]
        ins = (*("B_H",) * 4, "_", "H", "H", of_state, "B")
        y, inner = each_device(scan, ins, ("B_H", of_state))(
            q, k, v, to_heads(rates), token_scale, self._inner_weights(), self._inner_norm(), inner, docs
        )
        y = self.post_norm(to_stream(y.reshape(x.shape)))
        if self.g_proj is not None:
            y = jax.nn.gelu(self.g_proj(x)) * y
        return self.o_proj(y), TTTState(inner, tail)

    @property
    def learner(self) -> Learner:
        """The description of the learner in the layer."""
        hidden_sizes = tuple(layer.kernel.shape[-1] for layer in list(self.inner)[:-1])
        norm = self.inner_norm is not None
        return published.ttt(hidden_sizes, self.mini_batch_size, norm=norm, use_bias=self.inner_bias)

    def _rates(self, x, base):
        """`eta_ts = base * max(0, 1/(t+1) + learned[t]) * sigmoid(gate(x_s))`, as its factors of `s` and of `t`."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if self.learning_rate is None or self.token_scale is None:
            rates = jnp.full((*x.shape[:2], self.num_heads), base, dtype)
            return rates, jnp.ones((self.mini_batch_size,), dtype)
        rates = base * jax.nn.sigmoid(self.learning_rate(x).astype(dtype))
        token_scale = self.token_scale[...].astype(dtype)
        return rates, jnp.maximum(0, token_scale + 1 / jnp.arange(1, self.mini_batch_size + 1, dtype=dtype))

    def _queries_and_keys(self, x, tail, docs):
        shared = to_heads(self.q_proj(x))
        if self.k_proj is not None:
            return shared, to_heads(self.k_proj(x)), None
        assert self.conv_q is not None
        assert self.conv_k is not None
        q, new_tail = self.conv_q(shared, tail, docs=docs)
        k, _ = self.conv_k(shared, tail, docs=docs)
        return q, k, new_tail

    def _inner_norm(self) -> InnerNorm | None:
        return None if self.inner_norm is None else InnerNorm(self.inner_norm.scale[...], self.inner_norm.bias[...])

    def _inner_weights(self) -> tuple[InnerLayer, ...]:
        if not self.inner:
            kernel = jnp.zeros((self.num_heads, self.head_dim, self.head_dim), self.param_dtype)
            return (InnerLayer(kernel, kernel[:, 0] if self.inner_bias else None),)
        return tuple(
            InnerLayer(layer.kernel[...], None if layer.bias is None else layer.bias[...]) for layer in self.inner
        )


class TTTLinear(MiniBatchTTT):
    """TTT-Linear: the hidden state is a linear model `x + LN(x W + b)` for every head.

    >>> layer = TTTLinear(64, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    The arguments are those of `MiniBatchTTT`; the inner model has no hidden layers.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mini_batch_size: int = 16,
        inner_learning_rate: float = 1.0,
        inner_norm: bool = True,
        inner_bias: bool = True,
        learned_start: bool = True,
        learned_rate: bool = True,
        share_qk: bool = False,
        gate: bool = False,
        conv_kernel: int = 4,
        conv_init: ConvInit = "pytorch",
        rope_theta: float | None = 10_000.0,
        aligned: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        inner_kernel_init: Initializer | None = None,
        remat_mini_batches: int = 1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            mini_batch_size=mini_batch_size,
            inner_learning_rate=inner_learning_rate,
            inner_norm=inner_norm,
            inner_bias=inner_bias,
            learned_start=learned_start,
            learned_rate=learned_rate,
            share_qk=share_qk,
            gate=gate,
            conv_kernel=conv_kernel,
            conv_init=conv_init,
            rope_theta=rope_theta,
            aligned=aligned,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            inner_kernel_init=inner_kernel_init,
            remat_mini_batches=remat_mini_batches,
            implementation=implementation,
            rngs=rngs,
        )


class TTTMLP(MiniBatchTTT):
    """TTT-MLP: the hidden state is an MLP with one hidden layer four times as wide as the head.

    >>> layer = TTTMLP(64, 4, rngs=nnx.Rngs(0))
    >>> y, state = layer.extend(jnp.ones((2, 50, 64)), layer.init_state(2))

    The arguments are those of `MiniBatchTTT`; the inner model has one hidden layer and learned initial weights.
    The base inner learning rate is 0.1 as in the paper.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mini_batch_size: int = 16,
        inner_learning_rate: float = 0.1,
        inner_norm: bool = True,
        inner_bias: bool = True,
        learned_rate: bool = True,
        share_qk: bool = False,
        gate: bool = False,
        conv_kernel: int = 4,
        conv_init: ConvInit = "pytorch",
        rope_theta: float | None = 10_000.0,
        aligned: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        inner_kernel_init: Initializer | None = None,
        remat_mini_batches: int = 1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            inner_hidden=(4 * (hidden_size // num_heads),),
            mini_batch_size=mini_batch_size,
            inner_learning_rate=inner_learning_rate,
            inner_norm=inner_norm,
            inner_bias=inner_bias,
            learned_rate=learned_rate,
            share_qk=share_qk,
            gate=gate,
            conv_kernel=conv_kernel,
            conv_init=conv_init,
            rope_theta=rope_theta,
            aligned=aligned,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            inner_kernel_init=inner_kernel_init,
            remat_mini_batches=remat_mini_batches,
            implementation=implementation,
            rngs=rngs,
        )
