"""Comba (arXiv 2506.02475), with the layer of flash-linear-attention but for one thing, see `Comba`."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tttlm.mixers.learners.conventions import Conventions, OutputGate, unit
from tttlm.mixers.learners.gates import TokenGate, mamba_decay
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import NonNegativeFloat


@dataclass(frozen=True)
class CombaConfig(LearnerConfig):
    """Configuration of the mixer `comba`; see `Comba`."""

    correction: NonNegativeFloat = 1.0
    """Initial value of the correction of queries; small models may do better with 0.02."""


class Comba(PublishedLayer):
    """Comba (arXiv 2506.02475): Gated DeltaNet with errors at `p = σ(d) k`, before the decay, and queries `q - D p`.

    Queries and keys are normalised, and `p` is made of normalised keys: were it normalised itself, as in the public
    layer, `d` would change nothing.
    """

    Config: ClassVar[type[LearnerConfig]] = CombaConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 1.0)

    def _add_parameters(self, config: CombaConfig) -> None:
        self.feedback = nnx.Param(jnp.ones((self.num_heads,), self.param_dtype))
        self.correction = nnx.Param(jnp.full((self.num_heads,), config.correction, self.param_dtype))

    def _keys(self, q: Float[Array, "B T H K"], k: Float[Array, "B T H K"]) -> tuple[Array, Array, Array | None]:
        k = unit(k)
        p = k * jax.nn.sigmoid(self.feedback[...].astype(k.dtype))[:, None]
        return unit(unit(q) - self.correction[...].astype(q.dtype)[:, None] * p), k, p

    @classmethod
    def recipe(cls, config: CombaConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(TokenGate(), decay=mamba_decay()),
            output_gate=OutputGate(jax.nn.sigmoid),
        )
        return published.comba(head_dim**-0.5), conventions


@register("comba")
@dataclass(frozen=True)
class CombaMixer(LearnerMixer[CombaConfig]):
    """Comba."""

    Config: ClassVar[type] = CombaConfig
    layer: ClassVar[type[PublishedLayer]] = Comba
