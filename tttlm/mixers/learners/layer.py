"""The general layer: any learner between projections, with the other parts of published layers."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.mixers.learners.conventions import Conventions
from tttlm.mixers.learners.memory import Memory, Tokens
from tttlm.ops.documents import Documents, documents, positions_in_document
from tttlm.ops.projection import projection
from tttlm.ops.rope import rotate_halves
from tttlm.ops.ttt import IMPLEMENTATIONS, Learner, LearnerState, learner_statistics
from tttlm.parts.conv import CausalConv
from tttlm.parts.partition import to_heads, to_stream
from tttlm.parts.sequence_layer import (
    LearningLayer,
    Precision,
    at_least_one,
    check_implementation,
    checked_positions,
    checked_precision,
)

default_kernel_init = nnx.initializers.normal(0.02)


class TTTState(NamedTuple):
    """The state of a layer.

    Attributes:
        inner: the state of every learner (see `tttlm.ops.ttt.LearnerState`).
        tails: the last inputs of the convolutions of queries, keys and values, `[B, W - 1, C]`; None without them.
        position: number of tokens of the document in progress; None without rotary embeddings.
    """

    inner: tuple[LearnerState, ...]
    tails: tuple[Float[Array, "B P C"] | None, ...]
    position: Int[Array, "*R B"] | None

    @property
    def document(self) -> Int[Array, "*B"]:
        """The id of the document in progress; in a stack of layers, of each layer."""
        return self.inner[0].document


class TTT(LearningLayer[TTTState]):
    """A sequence layer whose hidden state learns, for any description of a learner.

    >>> layer = TTT(64, 4, learner=Learner(clocks=Clocks(anchor=16)), rngs=nnx.Rngs(0))
    >>> y, state = layer.extend(jnp.ones((2, 50, 64)), layer.init_state(2))

    Args:
        hidden_size: size `D` of inputs and outputs.
        num_heads: number of heads `H`, each with a learner of its own.
        learner: the learner (see `tttlm.ops.ttt.Learner`); the outputs of several are summed.
        conventions: the other parts of the layer.
        head_dim: size `K` of a query and key; None for `D / H`.
        value_dim: size `V` of a value and output; None for `head_dim`.
        norm_eps: epsilon of the norm of the outputs.
        aligned: asserts that every document starts when all clocks of the learner are at zero.
        dtype: dtype of projections, convolutions and norms; None promotes input and parameters. Learners compute in
            float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of all projections.
        remat_chunks: number of chunks that the backward pass recomputes at a time (see `tttlm.ops.ttt.learn`).
        implementation: name of an implementation of `tttlm.ops.ttt.learn`; None picks.
        rngs: random number generators of the parameters.

    Raises:
        InputError: the heads do not divide the hidden size, or an inner model with hidden layers would start from
            zeros.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        learner: Learner | tuple[Learner, ...],
        conventions: Conventions | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        norm_eps: float = 1e-6,
        aligned: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        remat_chunks: int = 1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        at_least_one(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim)
        at_least_one(remat_chunks=remat_chunks)
        check_implementation(implementation, IMPLEMENTATIONS)
        if head_dim is None and hidden_size % num_heads:
            raise InputError(
                "num_heads must divide hidden_size, or head_dim be given; "
                f"got hidden_size {hidden_size} and num_heads {num_heads}"
            )
        learners = (learner,) if isinstance(learner, Learner) else tuple(learner)
        if len({one.clocks.writes_per_token for one in learners}) > 1 or len({one.error_keys for one in learners}) > 1:
            raise InputError(
                "learners of one layer must have the same number of writes per token, and all or none error keys"
            )
        conventions = Conventions() if conventions is None else conventions
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        self.hidden_size, self.num_heads, self.head_dim, self.value_dim = hidden_size, num_heads, head_dim, value_dim
        self.conventions, self.norm_eps, self.aligned = conventions, norm_eps, aligned
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)
        self.remat_chunks, self.implementation = remat_chunks, implementation
        self.writes_per_token = learners[0].clocks.writes_per_token
        dtypes: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(inputs: int, outputs: int, use_bias: bool = False, init: Initializer = kernel_init) -> nnx.Linear:
            how: Any = {"kernel_init": init, "dot_general": projection, "precision": self.precision}
            return nnx.Linear(inputs, outputs, use_bias=use_bias, **how, **dtypes)

        self._add_projections(linear, dtypes)
        features = self._features(jax.ShapeDtypeStruct((1, head_dim), jnp.float32))
        self.memories = nnx.List(
            Memory(
                one,
                hidden_size,
                num_heads,
                features,
                value_dim,
                gates=conventions.gates,
                learned_start=conventions.learned_start,
                kernel_init=kernel_init,
                **dtypes,
            )
            for one in learners
        )
        self._add_outputs(linear)

    def _add_projections(self, linear: Callable[..., nnx.Linear], dtypes: dict[str, Any]) -> None:
        """Creates the parameters that `_tokens` reads."""
        conventions, heads, writes = self.conventions, self.num_heads, self.writes_per_token
        sizes = (heads * self.head_dim, heads * writes * self.head_dim, heads * writes * self.value_dim)
        self.q_proj, self.k_proj, self.v_proj = (linear(self.hidden_size, size) for size in sizes)
        convs = [conventions.conv_kernel > 0] * 2 + [conventions.conv_kernel > 0 and conventions.conv_values]
        self.conv_q, self.conv_k, self.conv_v = (
            CausalConv(size, conventions.conv_kernel, use_bias=False, **dtypes) if used else None
            for size, used in zip(sizes, convs, strict=True)
        )

    def _add_outputs(self, linear: Callable[..., nnx.Linear]) -> None:
        """Creates the parameters that `_output` reads."""
        outputs, gate = self.num_heads * self.value_dim, self.conventions.output_gate
        ones = lambda size: nnx.Param(jnp.ones((size,), self.param_dtype))
        self.skip = ones(outputs) if self.conventions.skip else None
        self.o_norm = ones(self.value_dim) if self.conventions.output_norm else None
        self.g_down = linear(self.hidden_size, gate.rank) if gate and gate.rank else None
        gates = self.num_heads if gate and gate.per_head else outputs
        self.g_proj = linear(gate.rank or self.hidden_size, gates, gate.use_bias) if gate else None
        self.o_proj = linear(outputs, self.hidden_size)

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
                `tttlm.ops.documents`). A document that starts with a chunk has the outputs that it has alone.
            lengths: Number of tokens of each sequence. Padding after them is neither read nor written and does not
                count as a position: every sequence has the outputs that it has alone. Outputs at padding are 0.
            mask: The same for padding anywhere, True at tokens.
            positions: Positions by which queries and keys are rotated; None counts the tokens of the document. They do
                not change what is learned from or when.
            inner_learning_rate_multiplier: Multiplier of the inner learning rates, for their warm-up in training;
                0 reads the inner model out without learning.

        Raises:
            InputError: An argument has a wrong shape or dtype, or the layer has no rotary embeddings for `positions`.
        """
        options = {"multiplier": inner_learning_rate_multiplier}
        return self._read(x, None, segment_ids, lengths, mask, per_token=self._given(positions), **options)[0]

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

        Arguments are as for a call. `on_boundary` asserts that all clocks of the learner are at zero in every sequence,
        which saves the cost of starting within a chunk. Shapes and dtypes of a state never change.

        Raises:
            InputError: As for a call, or the state has another batch size.
        """
        options = {"multiplier": inner_learning_rate_multiplier, "on_boundary": on_boundary}
        return self._read(x, state, segment_ids, lengths, mask, per_token=self._given(positions), **options)

    def _given(self, positions: Any) -> dict[str, Array | None]:
        if positions is not None and self.conventions.rope_theta is None:
            raise InputError("positions are those of rotary embeddings, which this layer does not have: give None")
        return {"positions": checked_positions(positions)}

    def _init_state(self, batch: int) -> TTTState:
        tails = self._init_tails(batch, self.dtype or self.param_dtype)
        position = None if self.conventions.rope_theta is None else jnp.zeros((batch,), jnp.int32)
        return TTTState(tuple(memory._init_state(batch) for memory in self.memories), tails, position)

    def _init_tails(self, batch: int, dtype: Dtype) -> tuple[Array | None, ...]:
        return tuple(None if conv is None else conv.init_tail(batch, dtype) for conv in self._convs)

    def _inner_statistics(self, x, segment_ids, multiplier):
        tokens, _, _ = self._tokens(x, None, documents(segment_ids), None)
        return self._statistics(x, tokens, segment_ids, multiplier)

    def _statistics(self, x, tokens, segment_ids, multiplier):
        found = [
            learner_statistics(
                memory.learner,
                memory._inputs(x, tokens, multiplier),
                memory.weights,
                slow=memory.slow_parameters,
                position_scale=memory.scale_of_positions,
                segment_ids=segment_ids,
            )
            for memory in self.memories
        ]
        return jax.tree.map(lambda *a: sum(a) / len(a), *found)

    @property
    def _convs(self) -> tuple[CausalConv | None, ...]:
        return self.conv_q, self.conv_k, self.conv_v

    def _features(self, shape: jax.ShapeDtypeStruct) -> int:
        """The size of a key as the learner gets it."""
        feature_map = self.conventions.feature_map
        return shape.shape[-1] if feature_map is None else jax.eval_shape(feature_map, shape).shape[-1]

    def _keys(self, q: Float[Array, "B T H K"], k: Float[Array, "B Tn H K"]) -> tuple[Array, Array, Array | None]:
        """Queries, keys and error keys as the learner gets them."""
        feature_map = self.conventions.feature_map
        return (q, k, None) if feature_map is None else (feature_map(q), feature_map(k), None)

    def _projected(self, x, state, docs):
        """Queries, keys and values `[B, T, H n K]` after the convolutions, and the next tails."""
        old = (None, None, None) if state is None else state.tails
        projected, tails = [], []
        for proj, conv, tail in zip((self.q_proj, self.k_proj, self.v_proj), self._convs, old, strict=True):
            a = to_heads(proj(x))
            a, tail = (a, None) if conv is None else conv(a, tail, docs=docs)
            projected.append(a)
            tails.append(tail)
        return tuple(projected), tuple(tails)

    def _positions(self, state, docs, given, shape):
        """The positions `[B, T]` of rotary embeddings, and the next of the document; None without them."""
        if self.conventions.rope_theta is None:
            return None, None
        first = jnp.zeros(shape[:1], jnp.int32) if state is None else state.position
        counted, after = positions_in_document(docs, shape[1], first)
        return counted if given is None else given, after

    def _of_projected(self, projected, positions):
        """What tokens bring to every learner."""
        conventions, writes, (batch, time, _) = self.conventions, self.writes_per_token, projected[0].shape
        activations = (conventions.activation,) * 2 + (conventions.value_activation,)
        q, k, v = (a if act is None else act(a) for a, act in zip(projected, activations, strict=True))

        def by_write(a: Array) -> Array:  # [B, T, H n K] to [B, T n, H, K]
            a = a.reshape(batch, time, self.num_heads, writes, -1)
            return a.swapaxes(2, 3).reshape(batch, time * writes, self.num_heads, -1)

        q, k, error_keys = self._keys(q.reshape(batch, time, self.num_heads, -1), by_write(k))
        if positions is not None:
            q, k = self._rotated(q, positions), self._rotated(k, jnp.repeat(positions, writes, axis=1))
        return Tokens(q, k, by_write(v), error_keys)

    def _rotated(self, a: Float[Array, "B T H K"], positions: Int[Array, "#B T"]) -> Float[Array, "B T H K"]:
        """Queries or keys with the layer's rotary embedding, of `rope_dim` channels at a time."""
        assert self.conventions.rope_theta is not None
        heads = a.reshape(*a.shape[:2], -1, self.conventions.rope_dim or a.shape[-1])
        return rotate_halves(heads, positions, self.conventions.rope_theta).reshape(a.shape).astype(a.dtype)

    def _tokens(self, x, state, docs, positions):
        """What tokens bring to every learner, the next tails and the next position."""
        projected, tails = self._projected(x, state, docs)
        positions, position = self._positions(state, docs, positions, x.shape)
        return self._of_projected(projected, positions), tails, position

    def _extend(
        self,
        x: Float[Array, "B T D"],
        state: TTTState | None,
        docs: Documents | None,
        *,
        multiplier: Any,
        on_boundary: bool = False,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], TTTState]:
        tokens, tails, position = self._tokens(x, state, docs, positions)
        y, inner = self._learned(x, tokens, state, docs, multiplier=multiplier, on_boundary=on_boundary)
        return self._output(x, tokens, y), TTTState(inner, tails, position)

    def _learned(self, x, tokens, state, docs, *, multiplier, on_boundary):
        """The summed outputs `[B, T, H, V]` of the learners, and their next states."""
        results = [
            memory._learn(
                memory._inputs(x, tokens, multiplier),
                None if state is None else state.inner[i],
                docs,
                aligned=self.aligned,
                on_boundary=on_boundary,
                remat_chunks=self.remat_chunks,
                implementation=self.implementation,
            )
            for i, memory in enumerate(self.memories)
        ]
        return reduce(jnp.add, (out for out, _ in results)), tuple(after for _, after in results)

    def _output(
        self, x: Float[Array, "B T D"], tokens: Tokens | None, y: Float[Array, "B T H V"]
    ) -> Float[Array, "B T D"]:
        """The layer's outputs, of those of its learners; only a layer with a skip reads the tokens."""
        return self.o_proj(to_stream(self._gated(x, tokens, y)))

    def _gated(self, x, tokens, y):
        """The outputs `[B, T, H V]` of the learners with skip, norm and gate, before the projection out."""
        if self.skip is not None and tokens is not None:
            last = tokens.values[:, self.writes_per_token - 1 :: self.writes_per_token]
            y = y + last * self.skip[...].astype(last.dtype).reshape(last.shape[2:])
        y = self._normed(y)
        if self.g_proj is not None and self.conventions.output_gate is not None:
            gate = to_heads(self.g_proj(x if self.g_down is None else self.g_down(x)))
            y = y * self.conventions.output_gate.activation(gate).reshape(*y.shape[:3], -1)
        return y.reshape(*x.shape[:2], -1)

    def _normed(self, y: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        """The RMS norm of every head's output, computed in float32 at least."""
        if self.o_norm is None:
            return y
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.norm_eps)
        return (wide * self.o_norm[...].astype(wide.dtype)).astype(y.dtype)
