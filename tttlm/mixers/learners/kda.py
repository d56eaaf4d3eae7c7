"""KDA, Kimi Delta Attention (arXiv 2510.26692), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate, bounded_decay, mamba_decay, twice_sigmoid
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Range


@dataclass(frozen=True)
class KDAConfig(LearnerConfig):
    """Configuration of the mixer `kda`; see `KDA`."""

    allow_neg_eigval: bool = False
    """Whether rates are between 0 and 2 instead of 0 and 1, so that a key can be written over with its opposite."""
    lower_bound: Annotated[float, Range(least=-1e4, below=0)] | None = None
    """Lower bound of the logarithm of a gate, below 0; None for no bound."""


class KDA(PublishedLayer):
    """Kimi Delta Attention (arXiv 2510.26692): Gated DeltaNet with a decay gate for every key channel.

    The gates of decay and output are two projections each, of rank `V`.
    """

    Config: ClassVar[type[LearnerConfig]] = KDAConfig

    @classmethod
    def recipe(cls, config: KDAConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        decay = mamba_decay(rank=value_dim, smallest=1.0)
        if config.lower_bound is not None:
            decay = bounded_decay(config.lower_bound, rank=value_dim)
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(rate=TokenGate(twice_sigmoid if config.allow_neg_eigval else jax.nn.sigmoid), decay=decay),
            output_gate=OutputGate(jax.nn.sigmoid, rank=value_dim, use_bias=True),
        )
        return published.delta_rule(head_dim**-0.5, gate=True, per_channel=True), conventions


@register("kda")
@dataclass(frozen=True)
class KDAMixer(LearnerMixer[KDAConfig]):
    """KDA."""

    Config: ClassVar[type] = KDAConfig
    layer: ClassVar[type[PublishedLayer]] = KDA
