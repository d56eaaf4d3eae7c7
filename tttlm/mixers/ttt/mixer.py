"""The mixers `ttt_linear` and `ttt_mlp`: configuration, cost, sharding and requirements."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers.registry import Mixer, register
from tttlm.mixers.ttt.layer import TTTMLP, MiniBatchTTT, TTTLinear
from tttlm.ops.ttt import Shapes, check_choice, published
from tttlm.parts.partition import CONV_KERNEL, FEATURES, FROM_FEATURES, TO_FEATURES
from tttlm.ranges import Count, PositiveFloat


@dataclass(frozen=True)
class TTTConfig:
    """Configuration of the mixers `ttt_linear` and `ttt_mlp`; see `MiniBatchTTT`."""

    mini_batch_size: Count = 16
    """Tokens of one inner step."""
    inner_learning_rate: PositiveFloat | None = None
    """Base inner learning rate; None: 1.0 for ttt_linear, 0.1 for ttt_mlp, as in the paper."""
    inner_norm: bool = True
    """Whether the inner model has a LayerNorm and a residual."""
    inner_bias: bool = True
    """Whether the inner model has biases."""
    learned_start: bool = True
    """Whether the inner model's initial weights are parameters; otherwise they are zero (ttt_linear only)."""
    learned_rate: bool = True
    """Whether the inner learning rate of tokens and positions is learned; otherwise it is constant."""
    share_qk: bool | None = None
    """Whether queries and keys have one projection, with a convolution each; None: as in the backbone."""
    gate: bool | None = None
    """Whether the output is gated; None: as in the backbone."""
    remat_mini_batches: Count = 1
    """The backward pass stores the inner weights before every so many mini-batches and recomputes those between: a
    larger number saves memory and takes time. It changes no result."""
    implementation: str | None = None
    """Implementation of `tttlm.ops.ttt.learn`; None: the fastest exact one."""


@dataclass(frozen=True)
class TTTMixer(Mixer[TTTConfig]):
    """A TTT layer; by default its queries, keys and gate are those of the backbone."""

    Config: ClassVar[type] = TTTConfig
    section: ClassVar[str] = "ttt"
    has_inner_model: ClassVar[bool] = True
    extends_on_boundary: ClassVar[bool] = True
    changes_no_result: ClassVar[tuple[str, ...]] = ("remat_mini_batches",)
    inner_learning_rate_default: ClassVar[float]
    """The base inner learning rate of the paper."""
    parameter_rules = (
        (r"inner/\d+/kernel$", ("tensor context", "fsdp", "")),  # H I O
        (r"inner/\d+/bias$|inner_norm/(scale|bias)$", ("tensor context", "fsdp")),  # H K
        (r"(learning_rate|post_norm|conv_[qk])/bias$|post_norm/scale$", FEATURES),  # H, D
        (r"conv_[qk]/kernel$", CONV_KERNEL),
        (r"o_proj/kernel$", FROM_FEATURES),
        (r"([qkvg]_proj|learning_rate)/kernel$", TO_FEATURES),
    )

    @property
    def share_qk(self) -> bool:
        """Whether queries and keys share their projection."""
        return self.model.backbone == "mamba" if self.config.share_qk is None else self.config.share_qk

    @property
    def gate(self) -> bool:
        """Whether the output is gated."""
        return self.model.backbone == "mamba" if self.config.gate is None else self.config.gate

    @property
    def inner_learning_rate(self) -> float:
        """The base inner learning rate."""
        rate = self.config.inner_learning_rate
        return self.inner_learning_rate_default if rate is None else rate

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """Sizes of the inner model's input, hidden layers and output."""
        raise NotImplementedError

    @property
    def conv_before_block(self) -> bool:
        return self.model.backbone == "mamba"

    @property
    def alignment(self) -> int:
        return self.config.mini_batch_size

    def with_inner(self, *, mini_batch_size: int | None = None, learning_rate_multiplier: float = 1.0) -> TTTConfig:
        size = self.config.mini_batch_size if mini_batch_size is None else mini_batch_size
        rate = self.config.inner_learning_rate
        if learning_rate_multiplier != 1:
            rate = self.inner_learning_rate * learning_rate_multiplier
        return replace(self.config, mini_batch_size=size, inner_learning_rate=rate)

    def resized(self, path: str, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """`token_scale` is cut, or learned nothing at positions it was not trained at, where it stays 1 / (t + 1)."""
        if path != "token_scale":
            return super().resized(path, value, shape)
        kept = value[:, : shape[1]]
        return jnp.pad(kept, ((0, 0), (0, shape[1] - kept.shape[1])))

    @property
    def hidden_size_unit(self) -> int:
        return self.model.hidden_size // self.model.num_heads

    def check(self) -> None:
        hidden_size, num_heads = self.model.hidden_size, self.model.num_heads
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise InputError(
                "model.num_heads must divide model.hidden_size into even head dimensions, "
                f"got hidden_size {hidden_size} and num_heads {num_heads}"
            )
        config, sizes = self.config, self.inner_sizes
        norm, bias = config.inner_norm, config.inner_bias
        learner = published.ttt(sizes[1:-1], config.mini_batch_size, norm=norm, use_bias=bias)
        try:
            check_choice(learner, Shapes(1, 2, num_heads, sizes[0], sizes[-1]), config.implementation)
        except InputError as error:
            raise InputError(f"model.ttt: {error}") from None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of both forms of the layer."""
        config = self.config
        return {
            "mini_batch_size": config.mini_batch_size,
            "remat_mini_batches": config.remat_mini_batches,
            "implementation": config.implementation,
            "inner_learning_rate": self.inner_learning_rate,
            "inner_norm": config.inner_norm,
            "inner_bias": config.inner_bias,
            "learned_rate": config.learned_rate,
            "share_qk": self.share_qk,
            "gate": self.gate,
            "conv_kernel": self.model.conv_kernel,
            "conv_init": self.model.conv_init,
            "rope_theta": self.model.rope_theta,
            "kernel_init": self.kernel_init,
            **self.dtypes,
        }

    def flops_per_token(self, sequence_length: int) -> float:
        inputs, sizes = self.model.hidden_size, self.inner_sizes
        size = min(self.config.mini_batch_size, sequence_length)
        # Every inner kernel meets keys, queries and the update; all but the first pass a gradient down. The tokens
        # of a mini-batch meet each other twice.
        kernels = [i * o for i, o in pairwise(sizes)]
        inner = 6 * sum(kernels) + 2 * sum(kernels[1:]) + 2 * size * (sum(sizes[:-1]) + sum(sizes[1:]))
        projections = (3 if self.share_qk else 4) + (1 if self.gate else 0)
        convs = 2 * 2 * self.model.conv_kernel * inputs if self.share_qk else 0
        rates = 2 * inputs * self.model.num_heads if self.config.learned_rate else 0
        return float(2 * projections * inputs * inputs + convs + rates + self.model.num_heads * inner)


@register("ttt_linear")
@dataclass(frozen=True)
class TTTLinearMixer(TTTMixer):
    """TTT-Linear: the inner model is linear."""

    inner_learning_rate_default: ClassVar[float] = 1.0

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        return (self.model.hidden_size // self.model.num_heads,) * 2

    def build(self, *, rngs: nnx.Rngs) -> MiniBatchTTT:
        return TTTLinear(
            self.model.hidden_size,
            self.model.num_heads,
            learned_start=self.config.learned_start,
            rngs=rngs,
            **self.arguments,
        )


@register("ttt_mlp")
@dataclass(frozen=True)
class TTTMLPMixer(TTTMixer):
    """TTT-MLP: the inner model has a hidden layer four times as wide as the head."""

    inner_learning_rate_default: ClassVar[float] = 0.1
    inner_warmup_start: ClassVar[float] = 0.1

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        head_dim = self.model.hidden_size // self.model.num_heads
        return head_dim, 4 * head_dim, head_dim

    def check(self) -> None:
        super().check()
        if not self.config.learned_start:
            raise InputError("an inner MLP cannot learn from zeros: ttt_mlp needs model.ttt.learned_start")

    def build(self, *, rngs: nnx.Rngs) -> MiniBatchTTT:
        return TTTMLP(self.model.hidden_size, self.model.num_heads, rngs=rngs, **self.arguments)
