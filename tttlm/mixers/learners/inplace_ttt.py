"""In-Place TTT (arXiv 2604.06169): a feed-forward layer whose down projection learns, with the layer of its code."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tttlm.errors import InputError
from tttlm.mixers.learners.conventions import Conventions
from tttlm.mixers.learners.memory import Gates, Tokens
from tttlm.mixers.learners.mixer import ImplementationConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import AxisRule, register
from tttlm.ops.ttt import Learner, Neighbors, neighbor_writes, published
from tttlm.parts.partition import TO_FEATURES
from tttlm.ranges import Count, PositiveFloat, Size


@dataclass(frozen=True)
class InPlaceTTTConfig(ImplementationConfig):
    """Configuration of the mixer `inplace_ttt`; see `InPlaceTTT`."""

    intermediate_size: Size | None = None
    """Hidden size of the layer; None: 8/3 of hidden_size."""
    chunk_size: Count = 64
    """Number of tokens of a chunk, whose writes the next one reads."""
    inner_learning_rate: PositiveFloat = 1.0
    """Rate of every token."""


class InPlaceTTT(PublishedLayer):
    """In-Place TTT (arXiv 2604.06169): `y = (silu(x G) ∘ (x U)) W`, a feed-forward layer whose `W` learns.

    Every chunk adds `lr Σ h_sᵀ target_s` to the `W` that the next chunk reads, with `h = silu(x G) ∘ (x U)`. A target
    is a convolution of the neighbouring tokens of the chunk, two of them ahead, times a matrix. The convolution is
    initialised with zero, so that a layer starts as a feed-forward layer, whose weights it can use: the down projection
    is `memories[0].kernels[0][0]`. It has one head.

    >>> layer = InPlaceTTT(64, 1, InPlaceTTTConfig(intermediate_size=128), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)
    """

    Config: ClassVar[type[ImplementationConfig]] = InPlaceTTTConfig
    heads: ClassVar[int | None] = 1

    @classmethod
    def head_sizes(cls, hidden_size: int, num_heads: int, config: InPlaceTTTConfig) -> tuple[int, int]:
        if num_heads != 1:
            raise InputError(f"in-place TTT has one head, its feed-forward layer: num_heads must be 1, got {num_heads}")
        return config.intermediate_size or max(1, 8 * hidden_size // 3), hidden_size

    @classmethod
    def recipe(cls, config: InPlaceTTTConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(feature_map=None, gates=Gates(config.inner_learning_rate), learned_start=True)
        return published.inplace_ttt(config.chunk_size), conventions

    def _add_projections(self, linear: Any, dtypes: dict[str, Any]) -> None:
        eye = lambda key, shape, dtype, *_: jnp.eye(shape[0], dtype=dtype)
        self.gate_proj, self.up_proj = (linear(self.hidden_size, self.head_dim) for _ in range(2))
        self.target_proj = linear(self.hidden_size, self.hidden_size, init=eye)
        self.target_conv = nnx.Param(jnp.zeros((self.hidden_size, 5), self.param_dtype))

    def _add_outputs(self, linear: Any) -> None:
        """The outputs are those of the learner."""

    def _init_tails(self, batch: int, dtype: Any) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch, 2, size), dtype) for size in (self.head_dim, self.hidden_size))

    def _tokens(self, x, state, docs, positions):
        keys = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        given = (keys, x.astype(keys.dtype), self.target_conv[...].astype(keys.dtype))
        tail, offset = (None, None) if state is None else (Neighbors(*state.tails), state.inner[0].offset)
        chunk = self.memories[0].learner.clocks.step
        written, targets, tail = neighbor_writes(*given, chunk, tail=tail, offset=offset, docs=docs)
        queries, keys, values = (a[:, :, None] for a in (keys, written, self.target_proj(targets)))
        return Tokens(queries, keys, values, None), tuple(tail), None

    def _output(
        self, x: Float[Array, "B T D"], tokens: Tokens | None, y: Float[Array, "B T 1 D"]
    ) -> Float[Array, "B T D"]:
        return y[:, :, 0]


@register("inplace_ttt")
@dataclass(frozen=True)
class InPlaceTTTMixer(LearnerMixer[InPlaceTTTConfig]):
    """In-Place TTT, in a pattern with attention that has no other feed-forward layers (`intermediate_size: 0`)."""

    Config: ClassVar[type] = InPlaceTTTConfig
    layer: ClassVar[type[PublishedLayer]] = InPlaceTTT
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = (
        *LearnerMixer.parameter_rules,
        (r"(gate|target)_proj/kernel$", TO_FEATURES),
        (r"target_conv$", ("tensor context fsdp", "")),  # D J
    )

    def flops_per_token(self, sequence_length: int) -> float:
        """The targets of all writes of a token are projected, not of one."""
        more = self.learners[0].clocks.writes_per_token - 1
        return super().flops_per_token(sequence_length) + more * 2 * self.model.hidden_size**2
