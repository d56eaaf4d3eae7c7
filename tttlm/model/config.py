"""What a language model is made of: its configuration, the published sizes, and what a token costs."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from tttlm.errors import InputError
from tttlm.fields import check_fields
from tttlm.ranges import Count, NonNegativeFloat, PositiveFloat, Range, Size, SizeOrZero

MixerName = Literal["ttt_linear", "ttt_mlp", "attention", "sliding_attention", "mamba", "mamba2"]
TTT_MIXERS = ("ttt_linear", "ttt_mlp")
ATTENTION_MIXERS = ("attention", "sliding_attention")


@dataclass(frozen=True)
class TTTConfig:
    """Of the mixers `ttt_linear` and `ttt_mlp`; see `tttlm.layers.TTT`."""

    mini_batch_size: Count = 16
    """Tokens of one inner step."""
    inner_learning_rate: PositiveFloat | None = None
    """Base inner learning rate; None: 1.0 for ttt_linear, 0.1 for ttt_mlp, as in the paper."""
    inner_norm: bool = True
    """LayerNorm in the inner model and a residual around it."""
    inner_bias: bool = True
    """Biases of the inner model."""
    learned_start: bool = True
    """The inner model's initial weights are parameters; without, they are zero (ttt_linear only)."""
    learned_rate: bool = True
    """The inner learning rate of tokens and places is learned; without, it is the same for all."""
    share_qk: bool | None = None
    """One projection for queries and keys, with a convolution each; None: as the backbone has it."""
    gate: bool | None = None
    """Gate the output; None: as the backbone has it."""
    remat_mini_batches: Count = 1
    """The backward pass keeps the inner weights before every so many mini-batches and computes those in between again:
    more saves memory and takes time. It changes no result."""


@dataclass(frozen=True)
class AttentionConfig:
    """Of the mixers `attention` and `sliding_attention`; see `tttlm.layers.Attention`."""

    num_kv_heads: Count | None = None
    """Heads of keys and values; None: as many as of queries."""
    head_dim: Size | None = None
    """Size of a head; None: hidden_size / num_heads."""
    sliding_window: Count = 1024
    """Tokens that `sliding_attention` sees."""
    qk_norm: bool = False
    """RMSNorm of every query and key."""
    use_bias: bool = False
    """Biases of the four projections."""
    max_length: Count = 8192
    """Tokens that the cache of `attention` has room for; `sliding_attention` needs none."""
    implementation: str | None = None
    """Of `tttlm.ops.attention`; None: the fastest that is exact here."""


@dataclass(frozen=True)
class MambaConfig:
    """Of the mixer `mamba`; see `tttlm.layers.Mamba`."""

    state_size: Size = 16
    expand: Size = 2
    dt_rank: Size | None = None
    """Size of the bottleneck before the step sizes; None: ceil(hidden_size / 16)."""
    use_bias: bool = False
    """Biases of the projections in and out."""
    conv_bias: bool = True
    """Biases of the convolution."""


@dataclass(frozen=True)
class Mamba2Config:
    """Of the mixer `mamba2`; see `tttlm.layers.Mamba2`."""

    state_size: Size = 128
    head_dim: Size = 64
    expand: Size = 2
    num_groups: Size = 1
    norm_groups: Size = 1
    """Parts that the norm before the projection out is over; its authors' code has as many as `groups`."""
    dt_limit: tuple[NonNegativeFloat, Annotated[float, Range(above=0, infinite=True)]] = (0.0, float("inf"))
    """What step sizes are clipped to."""
    use_bias: bool = False
    """Biases of the projections in and out."""
    conv_bias: bool = True
    """Biases of the convolution."""
    chunk_size: Count | None = None
    """Tokens of a chunk; None: what is fast on this device."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, `layers` blocks whose mixers repeat a pattern, a norm and a head."""

    vocab_size: Count = 32_000
    hidden_size: Size = 768
    """Size of the residual stream."""
    num_layers: Size = 12
    """Blocks; a multiple of the number of `mixers`."""
    num_heads: Size = 12
    """Heads of TTT and attention mixers."""
    intermediate_size: SizeOrZero = 2048
    """Width of the feed-forward blocks; 0 for none, as in Mamba."""
    feed_forward_bias: bool = False
    """Biases of the feed-forward blocks."""
    mixers: tuple[MixerName, ...] = ("ttt_linear",)
    """The pattern of sequence layers, repeated over the depth; more than one makes a hybrid."""
    backbone: Literal["transformer", "mamba"] = "mamba"
    """What surrounds a TTT layer: `mamba` adds a convolution before each block, shared queries and keys, and a gate."""
    conv_before_block: bool | None = None
    """A convolution before each block; None: before TTT blocks of the Mamba backbone."""
    conv_kernel: Size = 4
    """Taps of every convolution."""
    tie_embeddings: bool = True
    """Whether the head is the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6
    initializer_range: NonNegativeFloat = 0.02
    ttt: TTTConfig = field(default_factory=TTTConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What is computed in; inner states stay in float32 at least."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What parameters are stored in."""
    remat: Literal["none", "block", "dots"] = "block"
    """What the backward pass computes again: nothing, whole blocks, or all but matrix products."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        if not self.mixers:
            raise InputError("model.mixers must name at least one mixer, got none")
        if self.num_layers % len(self.mixers):
            raise InputError(
                f"model.num_layers must be a multiple of the {len(self.mixers)} model.mixers that repeat, "
                f"got {self.num_layers}"
            )
        if any(m in TTT_MIXERS for m in self.mixers):
            if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
                raise InputError(
                    "model.num_heads must divide model.hidden_size into even head dimensions, "
                    f"got hidden_size {self.hidden_size} and num_heads {self.num_heads}"
                )
            if "ttt_mlp" in self.mixers and not self.ttt.learned_start:
                raise InputError("an inner MLP cannot learn from zeros: ttt_mlp needs model.ttt.learned_start")
        if any(m in ATTENTION_MIXERS for m in self.mixers):
            attention = self.attention
            if attention.head_dim is None and self.hidden_size % self.num_heads:
                raise InputError(
                    "model.num_heads must divide model.hidden_size, "
                    f"got hidden_size {self.hidden_size} and num_heads {self.num_heads}"
                )
            if (attention.head_dim or self.hidden_size // self.num_heads) % 2:
                raise InputError("attention heads must have an even head_dim, which rotary embeddings rotate in pairs")
            if attention.num_kv_heads is not None and self.num_heads % attention.num_kv_heads:
                raise InputError(
                    f"model.attention.num_kv_heads must divide model.num_heads ({self.num_heads}), "
                    f"got {attention.num_kv_heads}"
                )
        if "mamba2" in self.mixers:
            inner, m = self.mamba2.expand * self.hidden_size, self.mamba2
            if inner % m.head_dim or (inner // m.head_dim) % m.num_groups or inner % m.norm_groups:
                raise InputError(
                    f"model.mamba2: head_dim {m.head_dim} and norm_groups {m.norm_groups} must divide "
                    f"expand * hidden_size ({inner}), and num_groups {m.num_groups} the heads"
                )
            if not 0 <= m.dt_limit[0] < m.dt_limit[1]:
                raise InputError(f"model.mamba2.dt_limit is a smallest and a largest step size, got {m.dt_limit}")

    @property
    def repeats(self) -> int:
        """How often the pattern of mixers repeats."""
        return self.num_layers // len(self.mixers)

    def conv_before(self, mixer: str) -> bool:
        """Whether blocks of this mixer begin with a convolution."""
        if self.conv_before_block is None:
            return self.backbone == "mamba" and mixer in TTT_MIXERS
        return self.conv_before_block

    @property
    def share_qk(self) -> bool:
        """Whether TTT mixers share the projection of queries and keys."""
        return self.backbone == "mamba" if self.ttt.share_qk is None else self.ttt.share_qk

    @property
    def gate(self) -> bool:
        """Whether TTT mixers gate their output."""
        return self.backbone == "mamba" if self.ttt.gate is None else self.ttt.gate

    def inner_learning_rate(self, mixer: str) -> float:
        """Base inner learning rate of a TTT mixer."""
        if self.ttt.inner_learning_rate is None:
            return 0.1 if mixer == "ttt_mlp" else 1.0
        return self.ttt.inner_learning_rate

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, for each token of a sequence; see `tttlm.model.flops`."""
        from tttlm.model.flops import forward_flops_per_token

        return forward_flops_per_token(self, sequence_length)

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """How many parameters the model has, with or without those of embedding and head."""
        import math

        import jax
        from flax import nnx

        from tttlm.model.language_model import LanguageModel

        model = nnx.eval_shape(lambda: LanguageModel(self, rngs=nnx.Rngs(0)))
        count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        tables = 1 if self.tie_embeddings else 2
        return count if embeddings else count - tables * self.vocab_size * self.hidden_size

    @classmethod
    def preset(cls, size: str, *, mixer: MixerName = "ttt_linear", backbone: str = "mamba", **changes: Any) -> Self:
        """A published size: 125m, 350m, 760m or 1.3b; for Mamba its own 130m, 370m, 790m and 1.4b stand for them.

        >>> ModelConfig.preset("125m", mixer="ttt_mlp", backbone="transformer")

        Raises:
            InputError: for an unknown size.
        """
        if size not in PRESETS:
            raise InputError(f"unknown model size {size!r}; there are {', '.join(PRESETS)}")
        num_layers, hidden_size, num_heads, intermediate_size = PRESETS[size]
        if mixer in ("mamba", "mamba2"):  # arXiv 2312.00752, table 12: twice the blocks, no feed-forward
            num_layers, intermediate_size = {12: 24, 24: 48}[num_layers], 0
        values = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size,
        }
        return cls(**{**values, "mixers": (mixer,), "backbone": backbone, **changes})


# num_layers, hidden_size, num_heads, intermediate_size: arXiv 2407.04620, table of training details
PRESETS = {
    "125m": (12, 768, 12, 2048),
    "350m": (24, 1024, 16, 2736),
    "760m": (24, 1536, 16, 4096),
    "1.3b": (24, 2048, 32, 5504),
}
