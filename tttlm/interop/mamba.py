"""Mamba checkpoints (`MambaForCausalLM`): blocks of one mixer each, no feed-forward blocks."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, depthwise, expect, required, transposed
from tttlm.model import MambaConfig, ModelConfig

model_type = "mamba"
MIXERS = {"mamba": "mamba"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says."""
    expect(values, hidden_act="silu", use_bias=False, use_conv_bias=True)
    rank = values.get("time_step_rank")
    return ModelConfig(
        **common_config(values),
        mixers=("mamba",),
        mamba=MambaConfig(
            state_width=values.get("state_size", 16),
            expand=values.get("expand", 2),
            dt_rank=None if rank == "auto" else rank,
        ),
    )


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    return {
        "architectures": ["MambaForCausalLM"],
        **common_values(config),
        "state_size": config.mamba.state_width,
        "expand": config.mamba.expand,
        "intermediate_size": config.mamba.expand * config.width,
        "time_step_rank": config.mamba.dt_rank or -(-config.width // 16),
    }


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Mamba model."""
    layer = "backbone.layers.{i}.mixer."
    return [
        *common_table(config),
        transposed(f"{layer}x_proj.weight", "mixer.x_proj.kernel"),
        transposed(f"{layer}dt_proj.weight", "mixer.dt_proj.kernel"),
        Entry(f"{layer}dt_proj.bias", "mixer.dt_bias"),
    ]


def common_config(values: dict[str, Any]) -> dict[str, Any]:
    """What Mamba and Mamba-2 have in common."""
    return {
        "vocab_size": required(values, "vocab_size"),
        "width": required(values, "hidden_size"),
        "layers": required(values, "num_hidden_layers"),
        "feed_forward": 0,
        "conv_width": values.get("conv_kernel", 4),
        "tie_embeddings": values.get("tie_word_embeddings", True),
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "init_std": values.get("initializer_range", 0.1),
    }


def common_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    if config.feed_forward or config.conv_before(config.mixers[0]):
        raise InputError(
            f"a Mamba checkpoint has no feed-forward blocks, got model.feed_forward = {config.feed_forward}"
        )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "conv_kernel": config.conv_width,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
    }


def common_table(config: ModelConfig) -> list[Entry]:
    """Embedding, norms, and the parameters that both mixers have."""
    layer = "backbone.layers.{i}.mixer."
    head = [] if config.tie_embeddings else [Entry("lm_head.weight", "lm_head.embedding")]
    return [
        Entry("backbone.embeddings.weight", "embed.embedding"),
        Entry("backbone.norm_f.weight", "norm.scale"),
        Entry("backbone.layers.{i}.norm.weight", "mixer_norm.scale"),
        transposed(f"{layer}in_proj.weight", "mixer.in_proj.kernel"),
        depthwise(f"{layer}conv1d.weight", "mixer.conv.kernel"),
        Entry(f"{layer}conv1d.bias", "mixer.conv.bias"),
        Entry(f"{layer}A_log", "mixer.A_log"),
        Entry(f"{layer}D", "mixer.D"),
        transposed(f"{layer}out_proj.weight", "mixer.out_proj.kernel"),
        *head,
    ]
