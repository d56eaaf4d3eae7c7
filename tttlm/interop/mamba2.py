"""Mamba-2 checkpoints (`Mamba2ForCausalLM`)."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, expect
from tttlm.interop.mamba import common_config, common_table, common_values
from tttlm.model import Mamba2Config, ModelConfig

model_type = "mamba2"
MIXERS = {"mamba2": "mamba2"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says."""
    expect(values, hidden_act="silu", use_bias=False, use_conv_bias=True, rms_norm=True)
    low, high = (float(limit) for limit in values.get("time_step_limit", (0.0, "inf")))
    if low != 0.0 or high != float("inf"):
        raise InputError(f"config.json: time_step_limit must be [0, inf] here, got {[low, high]}")
    shared = common_config(values)
    mamba2 = Mamba2Config(
        state_width=values.get("state_size", 128),
        head_width=values.get("head_dim", 64),
        expand=values.get("expand", 2),
        groups=values.get("n_groups", 1),
    )
    heads = mamba2.expand * shared["width"] // mamba2.head_width
    if values.get("num_heads", heads) != heads:
        raise InputError(
            f"config.json: num_heads must be expand * hidden_size / head_dim = {heads}, got {values['num_heads']}"
        )
    return ModelConfig(**shared, mixers=("mamba2",), mamba2=mamba2)


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    m = config.mamba2
    return {
        "architectures": ["Mamba2ForCausalLM"],
        **common_values(config),
        "state_size": m.state_width,
        "head_dim": m.head_width,
        "expand": m.expand,
        "n_groups": m.groups,
        "num_heads": m.expand * config.width // m.head_width,
        "rms_norm": True,
    }


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Mamba-2 model."""
    layer = "backbone.layers.{i}.mixer."
    return [
        *common_table(config),
        Entry(f"{layer}dt_bias", "mixer.dt_bias"),
        Entry(f"{layer}norm.weight", "mixer.norm.scale"),
    ]
