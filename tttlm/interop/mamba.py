"""Mamba checkpoints (`MambaForCausalLM`): blocks of one mixer each, no feed-forward blocks."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, depthwise, expect, flag, integer, number, refuse, transposed
from tttlm.model import MambaConfig, ModelConfig

model_type = "mamba"
MIXERS = {"mamba": "mamba"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the defaults of `transformers`."""
    auto = values.get("time_step_rank") in (None, "auto")
    return ModelConfig(
        **common_config(values, vocab_size=50_280, hidden_size=768, num_layers=32, tied=True),
        mixers=("mamba",),
        mamba=MambaConfig(
            state_size=integer(values, "state_size", 16),
            expand=integer(values, "expand", 2),
            dt_rank=None if auto else integer(values, "time_step_rank"),
            use_bias=flag(values, "use_bias", False),
            conv_bias=flag(values, "use_conv_bias", True),
        ),
    )


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    return {
        "architectures": ["MambaForCausalLM"],
        **common_values(config),
        "state_size": config.mamba.state_size,
        "expand": config.mamba.expand,
        "intermediate_size": config.mamba.expand * config.hidden_size,
        "time_step_rank": config.mamba.dt_rank or -(-config.hidden_size // 16),
        "use_bias": config.mamba.use_bias,
        "use_conv_bias": config.mamba.conv_bias,
    }


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Mamba model."""
    layer = "backbone.layers.{i}.mixer."
    return [
        *common_table(config, use_bias=config.mamba.use_bias, conv_bias=config.mamba.conv_bias),
        transposed(f"{layer}x_proj.weight", "mixer.x_proj.kernel"),
        transposed(f"{layer}dt_proj.weight", "mixer.dt_proj.kernel"),
        Entry(f"{layer}dt_proj.bias", "mixer.dt_bias"),
    ]


def common_config(
    values: dict[str, Any], *, vocab_size: int, hidden_size: int, num_layers: int, tied: bool
) -> dict[str, Any]:
    """What Mamba and Mamba-2 have in common; the arguments are the defaults that they do not share."""
    hidden_size = integer(values, "hidden_size", hidden_size)
    expect(values, hidden_act="silu", intermediate_size=integer(values, "expand", 2) * hidden_size)
    refuse(values, "quantization_config", "attention_layers_idx", "mlp_intermediate_size")
    return {
        "vocab_size": integer(values, "vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "num_layers": integer(values, "num_hidden_layers", num_layers),
        "intermediate_size": 0,
        "conv_kernel": integer(values, "conv_kernel", 4),
        "tie_embeddings": flag(values, "tie_word_embeddings", tied),
        "norm_eps": number(values, "layer_norm_epsilon", 1e-5),
        "initializer_range": number(values, "initializer_range", 0.1),
    }


def common_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    if config.intermediate_size or config.conv_before(config.pattern[0]):
        raise InputError(
            f"a Mamba checkpoint has no feed-forward blocks, got model.intermediate_size = {config.intermediate_size}"
        )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "conv_kernel": config.conv_kernel,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
    }


def common_table(config: ModelConfig, *, use_bias: bool, conv_bias: bool) -> list[Entry]:
    """Embedding, norms, and the parameters that both mixers have."""
    layer = "backbone.layers.{i}.mixer."
    others = [] if config.tie_embeddings else [Entry("lm_head.weight", "lm_head.embedding")]
    if use_bias:
        others += [Entry(f"{layer}{name}.bias", f"mixer.{name}.bias") for name in ("in_proj", "out_proj")]
    if conv_bias:
        others.append(Entry(f"{layer}conv1d.bias", "mixer.conv.bias"))
    return [
        Entry("backbone.embeddings.weight", "embed.embedding"),
        Entry("backbone.norm_f.weight", "norm.scale"),
        Entry("backbone.layers.{i}.norm.weight", "mixer_norm.scale"),
        transposed(f"{layer}in_proj.weight", "mixer.in_proj.kernel"),
        depthwise(f"{layer}conv1d.weight", "mixer.conv.kernel"),
        Entry(f"{layer}A_log", "mixer.A_log"),
        Entry(f"{layer}D", "mixer.D"),
        transposed(f"{layer}out_proj.weight", "mixer.out_proj.kernel"),
        *others,
    ]
