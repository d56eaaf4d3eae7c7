"""The mixer `mamba`: configuration, cost, sharding and requirements."""

import math
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tttlm.mixers.mamba.layer import Mamba, out_kernel_init
from tttlm.mixers.registry import Mixer, register
from tttlm.parts.partition import CONV_KERNEL, FEATURES, FROM_FEATURES
from tttlm.ranges import Size


@dataclass(frozen=True)
class MambaConfig:
    """Configuration of the mixer `mamba`; see `Mamba`."""

    state_size: Size = 16
    """Number of states of every channel."""
    expand: Size = 2
    """Number of channels divided by hidden_size."""
    dt_rank: Size | None = None
    """Size of the bottleneck before the step sizes; None: ceil(hidden_size / 16)."""
    use_bias: bool = False
    """Whether the projections in and out have biases."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""


@register("mamba")
@dataclass(frozen=True)
class MambaMixer(Mixer[MambaConfig]):
    """Mamba, with the initial weights of its authors' code."""

    Config: ClassVar[type] = MambaConfig
    replaces_feed_forward: ClassVar[bool] = True  # arXiv 2312.00752, table 12
    parameter_rules = (
        (r"(conv|in_proj)/bias$|(^|/)D$|dt_bias$", FEATURES),
        (r"A_log$", ("tensor context fsdp", "")),  # E N
        (r"conv/kernel$", CONV_KERNEL),
        (r"in_proj/kernel$", ("fsdp context tensor", "")),  # D and several outputs in a row, each sharded over tensor
        (r"x_proj/kernel$", ("tensor context", "fsdp")),  # E R+2N
        (r"dt_proj/kernel$", ("fsdp", "tensor context")),  # R E
        (r"out_proj/kernel$", FROM_FEATURES),
    )

    @property
    def channels(self) -> int:
        """Channels of the layer."""
        return self.config.expand * self.model.hidden_size

    @property
    def sharded(self) -> tuple[str, int]:
        return "channels", self.channels

    def build(self, *, rngs: nnx.Rngs) -> Mamba:
        return Mamba(
            self.model.hidden_size,
            state_size=self.config.state_size,
            expand=self.config.expand,
            dt_rank=self.config.dt_rank,
            conv_kernel=self.model.conv_kernel,
            use_bias=self.config.use_bias,
            conv_bias=self.config.conv_bias,
            out_kernel_init=out_kernel_init(self.model.num_layers),
            rngs=rngs,
            **self.dtypes,
        )

    def flops_per_token(self, sequence_length: int) -> float:
        inputs, channels, state = self.model.hidden_size, self.channels, self.config.state_size
        rank = self.config.dt_rank or math.ceil(inputs / 16)
        linear = 2 * channels * (3 * inputs + (rank + 2 * state) + rank + self.model.conv_kernel)
        return float(linear + 6 * channels * state)  # decay, input and read-out of every state
