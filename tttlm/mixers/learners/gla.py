"""Gated linear attention (arXiv 2312.06635), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import LogSigmoidOver, TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import PositiveFloat, Size, SizeOrZero


@dataclass(frozen=True)
class GLAConfig(LearnerConfig):
    """Configuration of the mixer `gla`; see `GLA`."""

    conv_kernel: SizeOrZero = 0
    """Number of taps of the convolutions of queries, keys and values, each followed by SiLU; 0 for neither."""
    gate_rank: Size = 16
    """Rank of the two projections of the gates."""
    gate_normalizer: PositiveFloat = 16.0
    """Divisor of the logarithm of a gate, `log sigmoid(logit) / normalizer`."""


class GLA(PublishedLayer):
    """Gated linear attention (arXiv 2312.06635): weights decay by a gate for every key channel.

    The output has a norm and a gate. A key has half of `D / H` channels by default.
    """

    Config: ClassVar[type[LearnerConfig]] = GLAConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 1.0)

    @classmethod
    def recipe(cls, config: GLAConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        activation = jax.nn.silu if config.conv_kernel else None
        decay = TokenGate(LogSigmoidOver(config.gate_normalizer), config.gate_rank, nnx.initializers.zeros)
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            activation=activation,
            value_activation=activation,
            feature_map=None,
            gates=Gates(decay=decay),
            output_gate=OutputGate(),
        )
        return published.linear_attention(head_dim**-0.5, gate=True, per_channel=True), conventions


@register("gla")
@dataclass(frozen=True)
class GLAMixer(LearnerMixer[GLAConfig]):
    """Gated linear attention."""

    Config: ClassVar[type] = GLAConfig
    layer: ClassVar[type[PublishedLayer]] = GLA
