"""DeltaProduct (arXiv 2502.10297), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate, mamba_decay, twice_sigmoid
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count


@dataclass(frozen=True)
class DeltaProductConfig(LearnerConfig):
    """Configuration of the mixer `deltaproduct`; see `DeltaProduct`."""

    writes_per_token: Count = 2
    """Number of keys, values and rates of a token, each of which makes a step."""
    decay: bool = True
    """Whether the weights decay before a token's first step, as in Gated DeltaNet."""
    allow_neg_eigval: bool = True
    """Whether rates are between 0 and 2 instead of 0 and 1, with which two steps can make a rotation."""


class DeltaProduct(PublishedLayer):
    """DeltaProduct (arXiv 2502.10297): DeltaNet with several steps a token; the output is read after the last step.

    The output has a norm and a gate. Keys and values have half of `D / H` channels by default.
    """

    Config: ClassVar[type[LearnerConfig]] = DeltaProductConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 0.5)

    @classmethod
    def recipe(cls, config: DeltaProductConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(TokenGate(twice_sigmoid if config.allow_neg_eigval else jax.nn.sigmoid), decay=mamba_decay()),
            output_gate=OutputGate(),
        )
        writes = config.writes_per_token
        return published.delta_rule(head_dim**-0.5, gate=config.decay, writes_per_token=writes), conventions


@register("deltaproduct")
@dataclass(frozen=True)
class DeltaProductMixer(LearnerMixer[DeltaProductConfig]):
    """DeltaProduct."""

    Config: ClassVar[type] = DeltaProductConfig
    layer: ClassVar[type[PublishedLayer]] = DeltaProduct
