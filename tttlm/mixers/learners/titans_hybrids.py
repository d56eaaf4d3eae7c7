"""Titans as a gate and as context: its memory beside attention in one layer (arXiv 2501.00663, section 4)."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from flax import nnx

from tttlm.mixers.attention.mixer import AttentionConfig, SlidingAttentionMixer
from tttlm.mixers.learners.hybrids import MemoryAsContext, MemoryAsGate
from tttlm.mixers.learners.mixer import LearnerMixer
from tttlm.mixers.learners.titans import TitansConfig, TitansMixer
from tttlm.mixers.registry import AxisRule, Mixer, register
from tttlm.ranges import Count

C = TypeVar("C", bound=TitansConfig)


@dataclass(frozen=True)
class TitansGateConfig(TitansConfig):
    """Configuration of the mixer `titans_gate`; see `MemoryAsGate` and `Titans`."""

    sliding_window: Count = 1024
    """Number of tokens that the attention attends to."""


@dataclass(frozen=True)
class TitansContextConfig(TitansConfig):
    """Configuration of the mixer `titans_context`; see `MemoryAsContext` and `Titans`."""

    chunk_size: Count = 64
    """Number of tokens of a chunk of the memory, which is a segment of the attention."""


@dataclass(frozen=True)
class TitansHybridMixer(Mixer[C]):
    """The memory of Titans and attention over `window` tokens, in one layer."""

    has_inner_model: ClassVar[bool] = True
    extends_on_boundary: ClassVar[bool] = True
    changes_no_result: ClassVar[tuple[str, ...]] = ("remat_chunks",)
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = LearnerMixer.parameter_rules

    @property
    def window(self) -> int:
        """Number of tokens that the attention attends to at most."""
        return self.config.chunk_size

    @property
    def parts(self) -> tuple[TitansMixer, SlidingAttentionMixer]:
        """The memory and the attention as mixers."""
        config = AttentionConfig(sliding_window=self.window)
        attention = SlidingAttentionMixer(self.name, self.model, config)
        return TitansMixer(self.name, self.model, self.config), attention

    def check(self) -> None:
        for part in self.parts:
            part.check()

    @property
    def alignment(self) -> int:
        return self.parts[0].alignment

    @property
    def hidden_size_unit(self) -> int:
        return self.parts[0].hidden_size_unit

    def flops_per_token(self, sequence_length: int) -> float:
        return sum(part.flops_per_token(sequence_length) for part in self.parts)


@register("titans_gate")
@dataclass(frozen=True)
class TitansGateMixer(TitansHybridMixer[TitansGateConfig]):
    """Attention over a window, gated by the memory of Titans."""

    Config: ClassVar[type] = TitansGateConfig

    @property
    def window(self) -> int:
        return self.config.sliding_window

    def build(self, *, rngs: nnx.Rngs) -> MemoryAsGate:
        memory, attention = self.parts
        return MemoryAsGate(memory.build(rngs=rngs), attention.build(rngs=rngs), norm_eps=self.model.norm_eps)


@register("titans_context")
@dataclass(frozen=True)
class TitansContextMixer(TitansHybridMixer[TitansContextConfig]):
    """Attention within segments, to which the memory of Titans gives what it recalls of those before."""

    Config: ClassVar[type] = TitansContextConfig

    def build(self, *, rngs: nnx.Rngs) -> MemoryAsContext:
        memory, attention = self.parts
        return MemoryAsContext(memory.build(rngs=rngs), attention.build(rngs=rngs), norm_eps=self.model.norm_eps)

    def flops_per_token(self, sequence_length: int) -> float:
        """Attention to the tokens of a segment and to what was recalled for them; and the cost of recalling."""
        memory, size = self.parts[0], self.model.hidden_size
        keys, values = memory.layer.head_sizes(size, self.model.num_heads, self.config)
        hidden = self.config.inner_size
        read = hidden * (keys + values) if hidden else keys * values
        recalled = size * (keys + 2 * values) + read  # of a head: query, its answer, gate and projection out
        attended = 7 * size**2 + 2 * (self.config.chunk_size + 1) * size
        return memory.flops_per_token(sequence_length) + 2.0 * (attended + self.model.num_heads * recalled)
