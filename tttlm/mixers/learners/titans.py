"""The neural memory of Titans as a layer (arXiv 2501.00663, section 4.3).

In turns with attention it is a pattern of mixers, `[titans, sliding_attention]`; side by side with attention in one
layer it is in `titans_hybrids`.
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import SigmoidUpTo, TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import PositiveFloat, SizeOrZero


@dataclass(frozen=True)
class TitansConfig(ChunkedConfig):
    """Configuration of the mixer `titans`; see `Titans`."""

    inner_size: SizeOrZero = 0
    """Hidden size of the memory; 0 for a linear memory, which starts from zero."""
    inner_learning_rate: PositiveFloat = 0.05
    """Largest rate of a token."""


class Titans(PublishedLayer):
    """The neural memory of Titans (arXiv 2501.00663): gradient steps on the squared error, with momentum and decay.

    Gradients are taken at the weights of the start of a chunk. The paper does not specify the ranges of rates; here
    they are `inner_learning_rate σ(x W + b)`.
    """

    Config: ClassVar[type[ChunkedConfig]] = TitansConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 1.0)

    @classmethod
    def recipe(cls, config: TitansConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        bias = nnx.initializers.constant
        gates = Gates(
            TokenGate(SigmoidUpTo(config.inner_learning_rate), bias_init=bias(0.0)),
            momentum=TokenGate(bias_init=bias(0.0)),
            decay=TokenGate(bias_init=bias(-4.0)),
        )
        deep = (config.inner_size,) if config.inner_size else ()
        conventions = Conventions(
            conv_kernel=config.conv_kernel, gates=gates, learned_start=bool(deep), output_gate=OutputGate()
        )
        return published.titans(deep, config.chunk_size), conventions


@register("titans")
@dataclass(frozen=True)
class TitansMixer(LearnerMixer[TitansConfig]):
    """The neural memory of Titans."""

    Config: ClassVar[type] = TitansConfig
    layer: ClassVar[type[PublishedLayer]] = Titans
