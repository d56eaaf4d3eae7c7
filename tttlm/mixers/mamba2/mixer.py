"""The mixer `mamba2`: configuration, cost, sharding and requirements."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers.mamba.layer import out_kernel_init
from tttlm.mixers.mamba2.layer import Mamba2
from tttlm.mixers.registry import Mixer, register
from tttlm.ops.ssm import ssd_chunk
from tttlm.parts.partition import CONV_KERNEL, FEATURES, FROM_FEATURES
from tttlm.ranges import Count, NonNegativeFloat, Range, Size


@dataclass(frozen=True)
class Mamba2Config:
    """Configuration of the mixer `mamba2`; see `Mamba2`."""

    state_size: Size = 128
    """Number of states of every channel."""
    head_dim: Size = 64
    """Number of channels of a head."""
    expand: Size = 2
    """Number of channels divided by hidden_size."""
    num_groups: Size = 1
    """Number of input and output vectors, which groups of heads have in common."""
    norm_groups: Size = 1
    """Number of parts that are normalised separately before the projection out; Mamba-2's authors have `num_groups`."""
    dt_limit: tuple[NonNegativeFloat, Annotated[float, Range(above=0, infinite=True)]] = (0.0, float("inf"))
    """Range to which step sizes are clipped."""
    use_bias: bool = False
    """Whether the projections in and out have biases."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    chunk_size: Count | None = None
    """Number of tokens of a chunk; None: a fast size for the device."""


@register("mamba2")
@dataclass(frozen=True)
class Mamba2Mixer(Mixer[Mamba2Config]):
    """Mamba-2, with the initial weights of its authors' code."""

    Config: ClassVar[type] = Mamba2Config
    replaces_feed_forward: ClassVar[bool] = True
    parameter_rules = (
        (r"(conv|in_proj)/bias$|(^|/)D$|dt_bias$|norm/scale$", FEATURES),
        (r"A_log$", FEATURES),  # H
        (r"conv/kernel$", CONV_KERNEL),
        (r"in_proj/kernel$", ("fsdp context tensor", "")),  # D and several outputs in a row, each sharded over tensor
        (r"out_proj/kernel$", FROM_FEATURES),
    )

    @property
    def channels(self) -> int:
        """Channels of the layer."""
        return self.config.expand * self.model.hidden_size

    @property
    def sharded(self) -> tuple[str, int]:
        return "heads", self.channels // self.config.head_dim

    def check(self) -> None:
        channels, m = self.channels, self.config
        if channels % m.head_dim or (channels // m.head_dim) % m.num_groups or channels % m.norm_groups:
            raise InputError(
                f"model.mamba2: head_dim {m.head_dim} and norm_groups {m.norm_groups} must divide "
                f"expand * hidden_size ({channels}), and num_groups {m.num_groups} the heads"
            )
        if not 0 <= m.dt_limit[0] < m.dt_limit[1]:
            raise InputError(f"model.mamba2.dt_limit is a smallest and a largest step size, got {m.dt_limit}")

    def build(self, *, rngs: nnx.Rngs) -> Mamba2:
        m = self.config
        return Mamba2(
            self.model.hidden_size,
            state_size=m.state_size,
            head_dim=m.head_dim,
            expand=m.expand,
            num_groups=m.num_groups,
            norm_groups=m.norm_groups,
            dt_limit=m.dt_limit,
            conv_kernel=self.model.conv_kernel,
            use_bias=m.use_bias,
            conv_bias=m.conv_bias,
            norm_eps=self.model.norm_eps,
            chunk_size=m.chunk_size,
            out_kernel_init=out_kernel_init(self.model.num_layers),
            rngs=rngs,
            **self.dtypes,
        )

    def flops_per_token(self, sequence_length: int) -> float:
        inputs, channels, m = self.model.hidden_size, self.channels, self.config
        inner_products = m.num_groups * m.state_size
        chunk = ssd_chunk(sequence_length, m.chunk_size)
        linear = 2 * inputs * (2 * channels + 2 * inner_products + channels // m.head_dim) + 2 * channels * inputs
        conv = 2 * self.model.conv_kernel * (channels + 2 * inner_products)
        # C B^T once a group, its product with the inputs once a head, and the states in and out
        return float(linear + conv + 2 * chunk * (inner_products + channels) + 4 * channels * m.state_size)

    @property
    def hidden_size_unit(self) -> int:
        channels = self.config.head_dim * self.config.num_groups
        return channels // math.gcd(channels, self.config.expand)
