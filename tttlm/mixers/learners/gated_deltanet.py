"""Gated DeltaNet (arXiv 2412.06464), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate, mamba_decay, twice_sigmoid
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published


@dataclass(frozen=True)
class GatedDeltaNetConfig(LearnerConfig):
    """Configuration of the mixer `gated_deltanet`; see `GatedDeltaNet`."""

    gate: bool = True
    """Whether the output is gated by `silu(g_proj(x))`."""
    allow_neg_eigval: bool = False
    """Whether rates are between 0 and 2 instead of 0 and 1, so that a key can be written over with its opposite."""


class GatedDeltaNet(PublishedLayer):
    """Gated DeltaNet (arXiv 2412.06464): DeltaNet whose weights decay by the gate of Mamba-2 before every step.

    The output has a norm and a gate. A key has half of `D / H` channels by default, so that a layer has as many
    parameters as one of attention.
    """

    Config: ClassVar[type[LearnerConfig]] = GatedDeltaNetConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 1.0)

    @classmethod
    def recipe(cls, config: GatedDeltaNetConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(
                rate=TokenGate(twice_sigmoid if config.allow_neg_eigval else jax.nn.sigmoid), decay=mamba_decay()
            ),
            output_gate=OutputGate() if config.gate else None,
        )
        return published.delta_rule(head_dim**-0.5, gate=True), conventions


@register("gated_deltanet")
@dataclass(frozen=True)
class GatedDeltaNetMixer(LearnerMixer[GatedDeltaNetConfig]):
    """Gated DeltaNet."""

    Config: ClassVar[type] = GatedDeltaNetConfig
    layer: ClassVar[type[PublishedLayer]] = GatedDeltaNet
