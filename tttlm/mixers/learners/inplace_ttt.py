"""In-Place TTT (arXiv 2604.06169): a feed-forward layer whose down projection learns, with the layer of its code."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from tttlm.errors import InputError
from tttlm.mixers.learners.layer import default_kernel_init
from tttlm.mixers.registry import Mixer, register
from tttlm.ops.documents import Documents, documents
from tttlm.ops.projection import projection
from tttlm.ops.ttt import (
    IMPLEMENTATIONS,
    InnerStatistics,
    LearnerInputs,
    LearnerState,
    Neighbors,
    Shapes,
    check_choice,
    init_learner_state,
    learn,
    learner_statistics,
    neighbor_writes,
    published,
)
from tttlm.ops.ttt.cost import flops_per_token
from tttlm.ops.ttt.state import InnerLayer
from tttlm.parts.partition import FROM_FEATURES, TO_FEATURES
from tttlm.parts.sequence_layer import (
    LearningLayer,
    Precision,
    at_least_one,
    check_implementation,
    checked_precision,
    own_promotion,
)
from tttlm.ranges import Count, PositiveFloat, Size


class InPlaceTTTState(NamedTuple):
    """The state: that of the down projection, and the last tokens, to whose targets the next ones contribute."""

    inner: LearnerState
    tail: Neighbors

    @property
    def document(self) -> Int[Array, "*B"]:
        """The id of the document in progress; in a stack of layers, of each layer."""
        return self.inner.document


class InPlaceTTT(LearningLayer[InPlaceTTTState]):
    """`h = silu(x G) ∘ (x U)`, `y = h W`; every chunk adds `lr Σ h_sᵀ target_s` to the `W` that the next one reads.

    A target is a convolution of the neighbouring tokens, two of them ahead, within the chunk, times a matrix. The
    convolution is initialised with zero, so that a layer starts as a feed-forward layer, whose weights it can use.

    >>> layer = InPlaceTTT(64, 128, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    Args:
        hidden_size: size `D` of inputs and outputs.
        intermediate_size: hidden size `F` of the feed-forward layer.
        chunk_size: tokens of a chunk.
        inner_learning_rate: rate of every token.
        dtype: dtype of the projections; None promotes input and parameters. The down projection learns in float32 at
            least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of the three kernels.
        remat_chunks: number of chunks that the backward pass recomputes at a time (see `tttlm.ops.ttt.learn`).
        implementation: name of an implementation of `tttlm.ops.ttt.learn`; None picks.
        rngs: random number generators of the parameters.

    Raises:
        InputError: a size is below 1, or the implementation is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        chunk_size: int = 64,
        inner_learning_rate: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        remat_chunks: int = 1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        at_least_one(hidden_size=hidden_size, intermediate_size=intermediate_size, chunk_size=chunk_size)
        at_least_one(remat_chunks=remat_chunks)
        check_implementation(implementation, IMPLEMENTATIONS)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.learner, self.inner_learning_rate = published.inplace_ttt(chunk_size), inner_learning_rate
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)
        self.remat_chunks, self.implementation = remat_chunks, implementation

        def linear(outputs: int, kernel_init: Initializer) -> nnx.Linear:
            return nnx.Linear(
                hidden_size,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=projection,
                rngs=rngs,
            )

        self.gate_proj, self.up_proj = (linear(intermediate_size, kernel_init) for _ in range(2))
        self.target_proj = linear(hidden_size, lambda key, shape, dtype, *_: jnp.eye(shape[0], dtype=dtype))
        self.down_proj = nnx.Param(kernel_init(rngs.params(), (intermediate_size, hidden_size), param_dtype))
        self.target_conv = nnx.Param(jnp.zeros((hidden_size, 5), param_dtype))

    def _init_state(self, batch: int) -> InPlaceTTTState:
        inner = init_learner_state(self.learner, self._weights(), batch, self.intermediate_size, self.hidden_size)
        dtype, sizes = self.dtype or self.param_dtype, (self.intermediate_size, self.hidden_size)
        return InPlaceTTTState(inner, Neighbors(*(jnp.zeros((batch, 2, size), dtype) for size in sizes)))

    @own_promotion
    def inner_statistics(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> InnerStatistics:
        """Statistics of learning and drift of the down projection on `x`; arguments as for a call."""
        inputs, _ = self._inputs(x, None, documents(segment_ids), inner_learning_rate_multiplier)
        return learner_statistics(self.learner, inputs, self._weights(), segment_ids=segment_ids)

    def _weights(self) -> tuple[InnerLayer]:
        return (InnerLayer(self.down_proj[...][None], None),)

    def _inputs(self, x, state, docs, multiplier):
        """The inputs of the learner, which has one head; and the next tail."""
        keys = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        tail, offset = (None, None) if state is None else (state.tail, state.inner.offset)
        conv = self.target_conv[...].astype(keys.dtype)
        size = self.learner.clocks.step
        written, targets, tail = neighbor_writes(
            keys, x.astype(keys.dtype), conv, size, tail=tail, offset=offset, docs=docs
        )
        targets = self.target_proj(targets)
        rates = jnp.full(written.shape[:2], self.inner_learning_rate * multiplier, jnp.float32)
        return LearnerInputs(keys[:, :, None], written[:, :, None], targets[:, :, None], rates[..., None]), tail

    def _extend(
        self,
        x: Float[Array, "B T D"],
        state: InPlaceTTTState | None,
        docs: Documents | None,
        *,
        multiplier: Any,
        on_boundary: bool = False,
    ) -> tuple[Float[Array, "B T D"], InPlaceTTTState]:
        inputs, tail = self._inputs(x, state, docs, multiplier)
        y, inner = learn(
            self.learner,
            inputs,
            self._weights(),
            state=None if state is None else state.inner,
            segment_ids=docs,
            on_boundary=on_boundary,
            remat_chunks=self.remat_chunks,
            implementation=self.implementation,
        )
        return y[:, :, 0], InPlaceTTTState(inner, tail)


@dataclass(frozen=True)
class InPlaceTTTConfig:
    """Configuration of the mixer `inplace_ttt`; see `InPlaceTTT`."""

    intermediate_size: Size | None = None
    """Hidden size of the layer; None: 8/3 of hidden_size."""
    chunk_size: Count = 64
    """Number of tokens of a chunk, whose writes the next one reads."""
    inner_learning_rate: PositiveFloat = 1.0
    """Rate of every token."""
    remat_chunks: Count = 1
    """The backward pass stores the weights before every so many chunks and recomputes those between: a larger number
    saves memory and takes time. It changes no result."""
    implementation: str | None = None
    """Implementation of `tttlm.ops.ttt.learn`; None: the fastest exact one."""


@register("inplace_ttt")
@dataclass(frozen=True)
class InPlaceTTTMixer(Mixer[InPlaceTTTConfig]):
    """In-Place TTT, in a pattern with attention that has no other feed-forward layers (`intermediate_size: 0`)."""

    Settings: ClassVar[type] = InPlaceTTTConfig
    has_inner_model: ClassVar[bool] = True
    extends_on_boundary: ClassVar[bool] = True
    changes_no_result: ClassVar[tuple[str, ...]] = ("remat_chunks",)
    parameter_rules = (
        (r"down_proj$", FROM_FEATURES),
        (r"target_conv$", ("tensor context fsdp", "")),  # D J
        (r"(gate|up|target)_proj/kernel$", TO_FEATURES),
    )

    @property
    def intermediate_size(self) -> int:
        """Hidden size of the layer."""
        given = self.settings.intermediate_size
        return max(1, 8 * self.model.hidden_size // 3) if given is None else given

    @property
    def sharded(self) -> tuple[str, int]:
        return "heads of in-place TTT", 1

    def check(self) -> None:
        sizes = self.intermediate_size, self.model.hidden_size
        learner = published.inplace_ttt(self.settings.chunk_size)
        try:
            check_choice(learner, Shapes(1, 2, 1, *sizes), self.settings.implementation)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None

    @property
    def alignment(self) -> int:
        return self.settings.chunk_size

    def build(self, *, rngs: nnx.Rngs) -> InPlaceTTT:
        settings: Any = self.settings
        return InPlaceTTT(
            self.model.hidden_size,
            self.intermediate_size,
            chunk_size=settings.chunk_size,
            inner_learning_rate=settings.inner_learning_rate,
            kernel_init=self.kernel_init,
            remat_chunks=settings.remat_chunks,
            implementation=settings.implementation,
            rngs=rngs,
            **self.dtypes,
        )

    def flops_per_token(self, sequence_length: int) -> float:
        inputs, size = self.model.hidden_size, self.intermediate_size
        learner = published.inplace_ttt(self.settings.chunk_size)
        projections = 4 * inputs * size + 2 * learner.clocks.writes_per_token * inputs * inputs
        inner = flops_per_token(learner, size, inputs, sequence_length, self.settings.implementation)
        return float(projections + inner)
