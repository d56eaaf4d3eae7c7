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


class LaCT(PublishedLayer):
    """A SwiGLU for every head that makes one step a chunk, which the next chunk reads.

    Within its own chunk a token reads nothing, so `lact` is combined with `sliding_attention`; published models add
    window attention to every layer, with the same projections.
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
