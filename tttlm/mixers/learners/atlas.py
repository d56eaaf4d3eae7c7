"""ATLAS and OmegaNet (arXiv 2505.23735), from the text of the paper."""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers.learners.gates import SigmoidUpTo, TokenGate
from tttlm.mixers.learners.layer import Conventions, OutputGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count, PositiveFloat, SizeOrZero


@dataclass(frozen=True)
class ATLASConfig(ChunkedConfig):
    """Configuration of the mixer `atlas`; see `ATLAS`."""

    window: Count = 4
    """Number of tokens whose losses are learned from at every token, including itself."""
    inner_size: SizeOrZero = 0
    """Hidden size of the memory `x + MLP(x)`; 0 for a linear memory, which starts from zero."""
    momentum: bool = True
    """Whether momentum is carried from token to token; without it and without `muon` the layer is OmegaNet."""
    muon: bool = True
    """Whether the step of every matrix is orthogonalised by Newton-Schulz iterations; needs `momentum`."""
    inner_learning_rate: PositiveFloat = 0.05
    """Largest step size of a token."""


class ATLAS(PublishedLayer):
    """Steps of the losses of the last tokens, weighted, with momentum and Newton-Schulz at every token.

    The paper does not specify the ranges of step sizes; here they are `inner_learning_rate σ(x W + b)`.
    """

    Config: ClassVar[type[ChunkedConfig]] = ATLASConfig
    expand: ClassVar[tuple[float, float]] = (0.75, 0.75)

    @classmethod
    def recipe(cls, config: ATLASConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        bias = nnx.initializers.constant
        gates = Gates(
            TokenGate(bias_init=bias(0.0)),
            momentum=TokenGate(bias_init=bias(0.0)),
            decay=TokenGate(bias_init=bias(4.0)),
            step_size=TokenGate(SigmoidUpTo(config.inner_learning_rate), bias_init=bias(0.0)),
        )
        deep = (config.inner_size,) if config.inner_size else ()
        conventions = Conventions(
            conv_kernel=config.conv_kernel, gates=gates, learned_start=bool(deep), output_gate=OutputGate()
        )
        if config.muon and not config.momentum:
            raise InputError("atlas: muon needs momentum: set muon to false for OmegaNet, got momentum false")
        if config.momentum:
            return published.atlas(deep, config.window, config.chunk_size, muon=config.muon), conventions
        return published.omega(deep, config.window, config.chunk_size), conventions


@register("atlas")
@dataclass(frozen=True)
class ATLASMixer(LearnerMixer[ATLASConfig]):
    """ATLAS, or OmegaNet without momentum."""

    Settings: ClassVar[type] = ATLASConfig
    layer: ClassVar[type[PublishedLayer]] = ATLAS
