"""LaCT (arXiv 2505.23884), the layer of its language-model code."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers.learners.conventions import Conventions, OutputGate, unit_by_norm
from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.learners.window import SharedWindow
from tttlm.mixers.registry import AxisRule, register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count, PositiveFloat, Size, SizeOrZero

SMALL_RATE = -6.907255  # its softplus is 0.001


@dataclass(frozen=True)
class LaCTConfig(ChunkedConfig):
    """Configuration of the mixer `lact`; see `LaCT`."""

    conv_kernel: SizeOrZero = 0
    """Number of taps of the convolutions of queries, keys and values; 0 for none, as published."""
    chunk_size: Count = 64
    """Number of tokens of a chunk, whose gradients make one step; published models have 1024 and more."""
    inner_size: Size | None = None
    """Intermediate size of the inner SwiGLU; None for `head_dim`."""
    momentum: bool = True
    """Whether momentum is carried from chunk to chunk."""
    muon: bool = True
    """Whether the step of every matrix is orthogonalised by Newton-Schulz iterations."""
    prenorm: bool = False
    """Whether unnormalised weights are accumulated, and only those that are read are normalised."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding, which rotates by the position within the document."""
    sliding_window: SizeOrZero = 0
    """Number of tokens that attention with the same queries, keys and values attends to, whose output is added (see
    `SharedWindow`), as in published models; 0 for none."""
    attention_head_dim: Size | None = None
    """Size of a head of that attention, and of what the rotary embedding rotates together, which divides `head_dim`;
    None for `head_dim`."""
    qk_norm: bool = False
    """Whether queries and keys of a layer with a window have an RMSNorm over all heads."""


class LaCT(PublishedLayer):
    """LaCT (arXiv 2505.23884): a SwiGLU for every head, which makes one step a chunk; the next chunk reads it.

    Within its own chunk a token reads nothing. Published models add window attention to every layer, with the same
    projections: `SharedWindow`, which the mixer `lact` builds for a `sliding_window`.
    """

    Config: ClassVar[type[ChunkedConfig]] = LaCTConfig

    @classmethod
    def recipe(cls, config: LaCTConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            feature_map=unit_by_norm,
            rope_theta=config.rope_theta,
            rope_dim=config.attention_head_dim,
            gates=Gates(
                TokenGate(jax.nn.softplus, bias_init=nnx.initializers.constant(SMALL_RATE)), momentum=TokenGate()
            ),
            learned_start=True,
            output_gate=OutputGate(per_head=True),
        )
        kind = {"momentum": config.momentum, "muon": config.muon, "prenorm": config.prenorm}
        return published.lact(config.inner_size or head_dim, config.chunk_size, **kind), conventions


@register("lact")
@dataclass(frozen=True)
class LaCTMixer(LearnerMixer[LaCTConfig]):
    """LaCT."""

    Config: ClassVar[type] = LaCTConfig
    layer: ClassVar[type[PublishedLayer]] = LaCT
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = (
        *LearnerMixer.parameter_rules,
        (r"qk_(scale|offset)$", ("", "tensor")),  # 2 F
    )

    def check(self) -> None:
        super().check()
        size, part = self.layer.head_sizes(self.model.hidden_size, self.num_heads, self.config)[0], self.attention_dim
        if size % part or part % 2:
            raise InputError(f"lact: attention_head_dim must be even and divide the head_dim {size}, got {part}")

    @property
    def attention_dim(self) -> int:
        """Size of a head of the attention."""
        return self.config.attention_head_dim or self._sizes[0]

    def build(self, *, rngs: nnx.Rngs) -> Any:
        memory, config = super().build(rngs=rngs), self.config
        if not config.sliding_window:
            return memory
        options: Any = {"qk_norm": config.qk_norm, "norm_eps": self.model.norm_eps}
        return SharedWindow(memory, sliding_window=config.sliding_window, **options)

    def flops_per_token(self, sequence_length: int) -> float:
        window = min(self.config.sliding_window, sequence_length)
        seen = window - window * (window - 1) / (2 * sequence_length)  # keys that a query attends to, on average
        return super().flops_per_token(sequence_length) + 4 * seen * self.num_heads * self._sizes[0]
