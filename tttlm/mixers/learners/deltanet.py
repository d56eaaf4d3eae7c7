"""DeltaNet (arXiv 2406.06484), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate, twice_sigmoid
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published


@dataclass(frozen=True)
class DeltaNetConfig(LearnerConfig):
    """Configuration of the mixer `deltanet`; see `DeltaNet`."""

    gate: bool = False
    """Whether the output is gated by `silu(g_proj(x))`."""
    allow_neg_eigval: bool = False
    """Whether rates are between 0 and 2 instead of 0 and 1, so that a key can be written over with its opposite."""


class DeltaNet(PublishedLayer):
    """DeltaNet (arXiv 2406.06484): at every token a step on half the squared error, with the rate `sigmoid(x W)`."""

    Config: ClassVar[type[LearnerConfig]] = DeltaNetConfig

    @classmethod
    def recipe(cls, config: DeltaNetConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(rate=TokenGate(twice_sigmoid if config.allow_neg_eigval else jax.nn.sigmoid)),
            output_gate=OutputGate() if config.gate else None,
        )
        return published.delta_rule(head_dim**-0.5), conventions


@register("deltanet")
@dataclass(frozen=True)
class DeltaNetMixer(LearnerMixer[DeltaNetConfig]):
    """DeltaNet."""

    Config: ClassVar[type] = DeltaNetConfig
    layer: ClassVar[type[PublishedLayer]] = DeltaNet
