"""ATLAS and OmegaNet (arXiv 2505.23735), from the text of the paper."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tttlm.errors import InputError
from tttlm.mixers.learners.conventions import Conventions, OutputGate, unit
from tttlm.mixers.learners.features import PolynomialFeatures
from tttlm.mixers.learners.gates import SigmoidUpTo, TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count, PositiveFloat, Range, SizeOrZero


@dataclass(frozen=True)
class ATLASConfig(ChunkedConfig):
    """Configuration of the mixer `atlas`; see `ATLAS`."""

    window: Count = 4
    """Number of tokens whose losses are learned from at every token, including itself."""
    inner_size: SizeOrZero = 0
    """Hidden size of the memory `x + MLP(x)`; 0 for a linear memory, which starts from zero."""
    polynomial_degree: Annotated[int, Range(least=1, most=4)] = 1
    """Largest degree of the polynomial features of queries and keys; 1 takes them as they are. With 2 and more the
    memory has `(K + degree)! / (K! degree!)` inputs for a head_dim of `K`, and no residual."""
    momentum: bool = True
    """Whether momentum is carried from token to token; without it and without `muon` the layer is OmegaNet."""
    muon: bool = True
    """Whether the step of every matrix is orthogonalised by Newton-Schulz iterations; needs `momentum`."""
    inner_learning_rate: PositiveFloat = 0.05
    """Largest step size of a token."""


class ATLAS(PublishedLayer):
    """ATLAS (arXiv 2505.23735): at every token a step on the weighted losses of the last `window` tokens.

    Steps have momentum and are orthogonalised by Newton-Schulz iterations. The paper does not specify the ranges
    of step sizes; here they are `inner_learning_rate σ(x W + b)`. Polynomial features have a learned coefficient for
    every degree, which starts at one (see `PolynomialFeatures`).
    """

    Config: ClassVar[type[ChunkedConfig]] = ATLASConfig
    expand: ClassVar[tuple[float, float]] = (0.75, 0.75)

    def _add_parameters(self, config: ATLASConfig) -> None:
        degree = config.polynomial_degree
        self.coefficients = nnx.Param(jnp.ones((degree + 1,), self.param_dtype)) if degree > 1 else None

    def _keys(self, q: Float[Array, "B T H K"], k: Float[Array, "B T H K"]) -> tuple[Array, Array, Array | None]:
        features, keys, _ = super()._keys(q, k)
        if self.coefficients is None:
            return features, keys, None
        degrees = PolynomialFeatures(len(self.coefficients) - 1).degrees(q.shape[-1])
        scale = self.coefficients[...].astype(q.dtype)[degrees].reshape(1, 1, 1, -1)
        return features * scale, keys * scale, None

    @classmethod
    def recipe(cls, config: ATLASConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        if config.muon and not config.momentum:
            raise InputError("atlas: muon needs momentum: set muon to false for OmegaNet, got momentum false")
        half, most = nnx.initializers.zeros, nnx.initializers.constant(4.0)
        deep, polynomial = (config.inner_size,) if config.inner_size else (), config.polynomial_degree > 1
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            feature_map=PolynomialFeatures(config.polynomial_degree) if polynomial else unit,
            gates=Gates(
                TokenGate(bias_init=half),
                momentum=TokenGate(bias_init=half),
                decay=TokenGate(bias_init=most),
                step_size=TokenGate(SigmoidUpTo(config.inner_learning_rate), bias_init=half),
            ),
            learned_start=bool(deep),
            output_gate=OutputGate(),
        )
        clocks, residual = (config.window, config.chunk_size), not polynomial
        if config.momentum:
            return published.atlas(deep, *clocks, muon=config.muon, residual=residual), conventions
        return published.omega(deep, *clocks, residual=residual), conventions


@register("atlas")
@dataclass(frozen=True)
class ATLASMixer(LearnerMixer[ATLASConfig]):
    """ATLAS, or OmegaNet without momentum."""

    Config: ClassVar[type] = ATLASConfig
    layer: ClassVar[type[PublishedLayer]] = ATLAS
