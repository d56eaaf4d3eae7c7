"""The mixers `attention` and `sliding_attention`: configuration, cost, sharding and requirements."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers.attention.attend import AttentionState, check_room
from tttlm.mixers.attention.layer import Attention
from tttlm.mixers.registry import Mixer, register
from tttlm.ops.rope import RopeScaling
from tttlm.parts.partition import FEATURES, FROM_FEATURES, TO_FEATURES
from tttlm.ranges import Count, Size


@dataclass(frozen=True)
class AttentionConfig:
    """Configuration of the mixers `attention` and `sliding_attention`; see `Attention`."""

    num_kv_heads: Count | None = None
    """Number of heads of keys and values; None: as many as of queries."""
    head_dim: Size | None = None
    """Size of a head; None: hidden_size / num_heads."""
    sliding_window: Count = 1024
    """Number of tokens that `sliding_attention` attends to."""
    qk_norm: bool = False
    """Whether every query and key has an RMSNorm."""
    use_bias: bool = False
    """Whether the four projections have biases."""
    out_bias: bool | None = None
    """Whether the projection out has a bias; None: as use_bias."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """RoPE scaling of Llama 3, for long sequences."""
    max_length: Count = 8192
    """Length in tokens of the cache of `attention`; `sliding_attention` does not need it."""
    implementation: str | None = None
    """Implementation of `tttlm.ops.attention`; None: the fastest exact one."""


@register("attention")
@dataclass(frozen=True)
class AttentionMixer(Mixer[AttentionConfig]):
    """Full causal attention, with a cache of `max_length` tokens."""

    Config: ClassVar[type] = AttentionConfig
    section: ClassVar[str] = "attention"
    parameter_rules = (
        (r"[qkv]_proj/bias$", FEATURES),
        (r"o_proj/kernel$", FROM_FEATURES),
        (r"[qkv]_proj/kernel$", TO_FEATURES),
    )

    def check(self) -> None:
        model, config = self.model, self.config
        if config.head_dim is None and model.hidden_size % model.num_heads:
            raise InputError(
                "model.num_heads must divide model.hidden_size, "
                f"got hidden_size {model.hidden_size} and num_heads {model.num_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                "attention heads must have an even head_dim, because rotary embeddings rotate pairs of channels; "
                f"got {self.head_dim}"
            )
        scaling = config.rope_scaling
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError(
                "model.attention.rope_scaling: low_freq_factor must be less than high_freq_factor, "
                f"got {scaling.low_freq_factor} and {scaling.high_freq_factor}"
            )
        if config.num_kv_heads is not None and model.num_heads % config.num_kv_heads:
            raise InputError(
                f"model.attention.num_kv_heads must divide model.num_heads ({model.num_heads}), "
                f"got {config.num_kv_heads}"
            )

    def build(self, *, rngs: nnx.Rngs) -> Attention:
        return self._layer(rngs, sliding_window=None, max_length=self.config.max_length)

    def _layer(self, rngs: nnx.Rngs, *, sliding_window: int | None, max_length: int | None) -> Attention:
        config = self.config
        return Attention(
            self.model.hidden_size,
            self.model.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=sliding_window,
            max_length=max_length,
            qk_norm=config.qk_norm,
            norm_eps=self.model.norm_eps,
            use_bias=config.use_bias,
            out_bias=config.out_bias,
            rope_theta=self.model.rope_theta,
            rope_scaling=config.rope_scaling,
            implementation=config.implementation,
            kernel_init=self.kernel_init,
            rngs=rngs,
            **self.dtypes,
        )

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.config.head_dim or self.model.hidden_size // self.model.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.config.num_kv_heads or self.model.num_heads

    def flops_per_token(self, sequence_length: int) -> float:
        return self._flops_per_token(sequence_length, sequence_length)

    def _flops_per_token(self, length: int, window: int) -> float:
        seen = window - window * (window - 1) / (2 * length)  # keys that a query attends to, on average
        heads, inputs = self.model.num_heads, self.model.hidden_size
        return 2 * inputs * self.head_dim * (2 * heads + 2 * self.num_kv_heads) + 4 * seen * heads * self.head_dim

    @property
    def cache_length(self) -> int | None:
        return self.config.max_length

    def with_cache_length(self, tokens: int) -> AttentionConfig:
        return replace(self.config, max_length=tokens)

    def check_room(self, state: AttentionState, tokens: int | jax.Array) -> None:
        check_room(state, tokens)

    @property
    def hidden_size_unit(self) -> int:
        if self.keeps_num_heads:
            return 1
        return self.head_dim * (self.model.num_heads // math.gcd(self.model.num_heads, self.num_kv_heads))

    @property
    def keeps_num_heads(self) -> bool:
        return self.config.head_dim is not None

    def with_num_heads(self, num_heads: int) -> AttentionConfig:
        if self.config.num_kv_heads is None:
            return self.config
        return replace(self.config, num_kv_heads=self.config.num_kv_heads * num_heads // self.model.num_heads)


@register("sliding_attention")
@dataclass(frozen=True)
class SlidingAttentionMixer(AttentionMixer):
    """Attention over the last `sliding_window` tokens, whose cache is as long as the window."""

    def build(self, *, rngs: nnx.Rngs) -> Attention:
        return self._layer(rngs, sliding_window=self.config.sliding_window, max_length=None)

    def flops_per_token(self, sequence_length: int) -> float:
        return self._flops_per_token(sequence_length, min(sequence_length, self.config.sliding_window))

    @property
    def cache_length(self) -> int | None:
        return None

    def check_room(self, state: AttentionState, tokens: int | jax.Array) -> None:
        """A window accepts any number of tokens."""
