"""LaCT (arXiv 2505.23884), the layer of its language-model code; its window attention is a mixer of its own."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.layer import Conventions, OutputGate, unit_by_norm
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count, PositiveFloat, Size, SizeOrZero

SMALL_RATE = -6.907255  # what softplus makes 0.001 of


@dataclass(frozen=True)
class LaCTConfig(ChunkedConfig):
    """Configuration of the mixer `lact`; see `LaCT`."""

    conv_kernel: SizeOrZero = 0
    """Taps of the convolutions of queries, keys and values; 0 for none, as published."""
    chunk_size: Count = 64
    """Tokens of a chunk, whose gradients make one step; published models have 1024 and more."""
    inner_size: Size | None = None
    """Columns of the inner SwiGLU; None for `head_dim`."""
    momentum: bool = True
    """Carry momentum from chunk to chunk."""
    muon: bool = True
    """Make the step of every matrix orthogonal by Newton-Schulz iterations."""
    prenorm: bool = False
    """Accumulate unnormalised weights, and normalise what is read alone."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding, which turns by the position within the document."""


class LaCT(PublishedLayer):
    """A SwiGLU for every head that makes one step a chunk, which the next chunk reads.

    A pattern of `lact` and `sliding_attention` gives tokens what their own chunk does not: published models add window
    attention to every layer, and share its projections.
    """

    Config: ClassVar[type[ChunkedConfig]] = LaCTConfig

    @classmethod
    def recipe(cls, config: LaCTConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            feature_map=unit_by_norm,
            rope_theta=config.rope_theta,
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

    Settings: ClassVar[type] = LaCTConfig
    layer: ClassVar[type[PublishedLayer]] = LaCT
