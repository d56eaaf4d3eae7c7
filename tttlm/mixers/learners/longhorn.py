"""Longhorn (arXiv 2407.14207)."""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Size


@dataclass(frozen=True)
class LonghornConfig(LearnerConfig):
    """Configuration of the mixer `longhorn`; see `Longhorn`."""

    head_dim: Size | None = 16
    """Size of a query and key, the states of a value channel; None: hidden_size / num_heads."""
    rate_rank: Size = 48
    """Rank of the two projections of the rates."""
    diagonal: bool = True
    """Whether only the diagonal of `kᵀk` is used, as in the released code."""


class Longhorn(PublishedLayer):
    """Longhorn (arXiv 2407.14207): the implicit step, with a rate for every value channel; `out = (q W + D v) silu(z)`.

    Released models have one head, whose queries and keys are common to all channels.
    """

    Config: ClassVar[type[LearnerConfig]] = LonghornConfig

    @classmethod
    def recipe(cls, config: LonghornConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            activation=None,
            feature_map=None,
            gates=Gates(TokenGate(rank=config.rate_rank, bias_init=nnx.initializers.zeros)),
            skip=True,
            output_norm=False,
            output_gate=OutputGate(),
        )
        return published.longhorn(diagonal=config.diagonal), conventions


@register("longhorn")
@dataclass(frozen=True)
class LonghornMixer(LearnerMixer[LonghornConfig]):
    """Longhorn."""

    Config: ClassVar[type] = LonghornConfig
    layer: ClassVar[type[PublishedLayer]] = Longhorn
