"""Configuration of a language model, the published sizes, and the cost of a token."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from tttlm.errors import InputError
from tttlm.fields import check_fields, from_values
from tttlm.mixers import AttentionConfig, Mamba2Config, MambaConfig, Mixer, TTTConfig, registered, section_of
from tttlm.ranges import Count, NonNegativeFloat, PositiveFloat, Size, SizeOrZero


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a language model: embedding, blocks whose mixers repeat a pattern, a norm and a head."""

    vocab_size: Count = 32_000
    """Number of tokens of the vocabulary."""
    hidden_size: Size = 768
    """Size of the residual stream."""
    num_layers: Size = 12
    """Number of blocks; a multiple of the number of `mixers`."""
    num_heads: Size = 12
    """Number of heads of TTT and attention mixers."""
    intermediate_size: SizeOrZero = 2048
    """Intermediate size of the feed-forward blocks; 0 for none, as in Mamba."""
    feed_forward_bias: bool = False
    """Whether feed-forward blocks have biases."""
    mixers: tuple[str, ...] = ("ttt_linear",)
    """The pattern of sequence layers, repeated over the depth; more than one makes a hybrid: ttt_linear, ttt_mlp,
    attention, sliding_attention, mamba, mamba2, the published learners (docs/inner-learner.md), and any other that is
    registered (docs/adding-a-mixer.md)."""
    backbone: Literal["transformer", "mamba"] = "mamba"
    """The backbone of TTT layers: `mamba` adds a convolution before each block, shared queries and keys, and a gate."""
    conv_before_block: bool | None = None
    """Whether each block begins with a convolution; None: TTT blocks of the Mamba backbone do."""
    conv_kernel: Size = 4
    """Number of taps of every convolution."""
    conv_init: Literal["pytorch", "lecun_normal"] = "pytorch"
    """Initialisation of the convolutions before blocks and in TTT layers: as PyTorch's, uniform with a bias, or as
    Flax's, lecun-normal with a bias of zero."""
    tie_embeddings: bool = True
    """Whether the head is tied to the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embeddings."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of the norms."""
    initializer_range: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights of embeddings and projections."""
    ttt: TTTConfig = field(default_factory=TTTConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    """Configurations of mixers without a field of their own, by name: published learners (docs/inner-learner.md), and
    mixers that are registered from outside the package."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of the computation; inner states are float32 at least."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of the parameters."""
    remat: Literal["none", "block", "dots"] = "block"
    """What the backward pass recomputes: nothing, complete blocks, or everything but matrix products."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        if not self.mixers:
            raise InputError("model.mixers must name at least one mixer, got none")
        if self.num_layers % len(self.mixers):
            raise InputError(
                f"model.num_layers must be a multiple of the {len(self.mixers)} model.mixers that repeat, "
                f"got {self.num_layers}"
            )
        if unknown := sorted(self.mixer_options.keys() - {section_of(name) for name in self.mixers}):
            raise InputError(f"model.mixer_options: {unknown[0]!r} is not in model.mixers: remove its options")
        for mixer in self.pattern:
            mixer.check()

    @property
    def pattern(self) -> tuple[Mixer, ...]:
        """The mixers of one repeat of the pattern (see `tttlm.mixers.Mixer`)."""
        return tuple(self.mixer(name) for name in self.mixers)

    def mixer(self, name: str) -> Mixer:
        """The mixer of that name in this model.

        Raises:
            InputError: no mixer of that name is registered, or its `mixer_options` are invalid.
        """
        mixer = registered(name)
        section = section_of(name)
        config = getattr(self, section, None)
        if not isinstance(config, mixer.Config):
            options = self.mixer_options.get(section, {})
            config = from_values(mixer.Config, options, prefix=f"model.mixer_options.{section}.")
        return mixer(name, self, config)

    def with_mixer_configs(self, configs: dict[str, Any], **changes: Any) -> Self:
        """The model with other configurations of mixers, by the key of each (see `tttlm.mixers.section_of`)."""
        ours = {section: values for section, values in configs.items() if hasattr(self, section)}
        others = {section: asdict(values) for section, values in configs.items() if section not in ours}
        return replace(self, mixer_options=self.mixer_options | others, **ours, **changes)

    @property
    def repeats(self) -> int:
        """The number of repeats of the pattern of mixers."""
        return self.num_layers // len(self.mixers)

    def conv_before(self, mixer: Mixer) -> bool:
        """Whether blocks of this mixer begin with a convolution."""
        return mixer.conv_before_block if self.conv_before_block is None else self.conv_before_block

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of this many tokens, so that their outputs are those they have alone."""
        return math.lcm(*(mixer.alignment for mixer in self.pattern))

    @property
    def cache_length(self) -> int | None:
        """The largest number of tokens of a state with a cache; None if the state has a fixed size."""
        return min((mixer.cache_length for mixer in self.pattern if mixer.cache_length is not None), default=None)

    def with_cache_length(self, tokens: int) -> Self:
        """The same model with a cache for that many tokens."""
        growing = [mixer for mixer in self.pattern if mixer.cache_length is not None]
        return self.with_mixer_configs({section_of(mixer.name): mixer.with_cache_length(tokens) for mixer in growing})

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations per token of a forward pass, the mean over a sequence of that length.

        Every multiply-add of a matrix product counts as two, by formula, because XLA's own count takes the body of a
        loop once. Element-wise operations are not counted, causal attention counts the keys that a query attends to,
        and a training step is three times the forward pass (without recomputation by rematerialisation).
        """
        conv = 2 * self.conv_kernel * self.hidden_size
        pattern = sum(
            mixer.flops_per_token(sequence_length) + (conv if self.conv_before(mixer) else 0) for mixer in self.pattern
        )
        feed_forward = 6 * self.hidden_size * self.intermediate_size
        head = 2 * self.hidden_size * self.vocab_size
        return self.repeats * pattern + self.num_layers * feed_forward + head

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence."""
        tail = (self.conv_kernel - 1) * self.hidden_size * np.dtype(self.dtype).itemsize
        return self.repeats * sum(m.state_bytes() + (tail if self.conv_before(m) else 0) for m in self.pattern)

    @classmethod
    def preset(cls, size: str, *, mixer: str = "ttt_linear", backbone: str = "mamba", **changes: Any) -> Self:
        """A published size: 125m, 350m, 760m or 1.3b.

        Mamba and Mamba-2 get the shape of their nearest published size (130m, 370m, 790m or 1.4b): twice the blocks and
        no feed-forward layers.

        >>> ModelConfig.preset("125m", mixer="ttt_mlp", backbone="transformer")

        Args:
            size: the name of the size.
            mixer: the mixer of all blocks.
            backbone: "transformer" or "mamba", the backbone of TTT layers.
            **changes: other fields of the configuration, which replace those of the size.

        Raises:
            InputError: the size is unknown.
        """
        if size not in PRESETS:
            raise InputError(f"unknown model size {size!r}; there are {', '.join(PRESETS)}")
        num_layers, hidden_size, num_heads, intermediate_size = PRESETS[size]
        if registered(mixer).replaces_feed_forward:
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
