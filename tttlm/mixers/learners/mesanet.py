"""MesaNet (arXiv 2506.05233), with the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published


@dataclass(frozen=True)
class MesaNetConfig(LearnerConfig):
    """Configuration of the mixer `mesanet`; see `MesaNet`."""

    gate: bool = False
    """Whether the output is gated by `silu(g_proj(x))`."""


class MesaNet(PublishedLayer):
    """MesaNet (arXiv 2506.05233): the ridge regression of all values on all keys so far, solved at every token.

    Here it is solved exactly; the public layer takes 30 steps of conjugate gradients.
    """

    Config: ClassVar[type[LearnerConfig]] = MesaNetConfig

    @classmethod
    def recipe(cls, config: MesaNetConfig, head_dim: int, value_dim: int) -> tuple[Learner, Conventions]:
        zeros = nnx.initializers.zeros
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            conv_values=False,
            value_activation=None,
            gates=Gates(TokenGate(bias_init=zeros), decay=TokenGate(jax.nn.log_sigmoid, bias_init=zeros)),
            output_gate=OutputGate() if config.gate else None,
        )
        return published.mesanet(), conventions


@register("mesanet")
@dataclass(frozen=True)
class MesaNetMixer(LearnerMixer[MesaNetConfig]):
    """MesaNet."""

    Config: ClassVar[type] = MesaNetConfig
    layer: ClassVar[type[PublishedLayer]] = MesaNet
