"""Mamba-2 checkpoints (`Mamba2ForCausalLM`)."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, expect, flag, integer
from tttlm.interop.mamba import common_config, common_table, common_values
from tttlm.model import Mamba2Config, ModelConfig

model_type = "mamba2"
MIXERS = {"mamba2": "mamba2"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the defaults of `transformers`."""
    expect(values, rms_norm=True)
    shared = common_config(values, vocab_size=32_768, hidden_size=4096, num_layers=64, tied=False)
    mamba2 = Mamba2Config(
        state_size=integer(values, "state_size", 128),
        head_dim=integer(values, "head_dim", 64),
        expand=integer(values, "expand", 2),
        num_groups=integer(values, "n_groups", 8),
        dt_limit=_dt_limit(values),
        use_bias=flag(values, "use_bias", False),
        conv_bias=flag(values, "use_conv_bias", True),
    )
    num_heads = mamba2.expand * shared["hidden_size"] // mamba2.head_dim
    if (given := integer(values, "num_heads", 128)) != num_heads:
        raise InputError(f"config.json: num_heads must be expand * hidden_size / head_dim = {num_heads}, got {given}")
    return ModelConfig(**shared, mixers=("mamba2",), mamba2=mamba2)


def _dt_limit(values: dict[str, Any]) -> tuple[float, float]:
    """Some writers spell infinity as a word, which JSON has no number for."""
    limit = values.get("time_step_limit") or (0.0, "inf")
    try:
        low, high = (float(part) for part in limit)
    except (TypeError, ValueError):
        raise InputError(f"config.json: time_step_limit must be two numbers, got {limit!r}") from None
    return low, high


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    m = config.mamba2
    if m.norm_groups != 1:
        raise InputError(
            f"the norm of a Mamba-2 checkpoint has one group, got model.mamba2.norm_groups = {m.norm_groups}"
        )
    return {
        "architectures": ["Mamba2ForCausalLM"],
        **common_values(config),
        "state_size": m.state_size,
        "head_dim": m.head_dim,
        "expand": m.expand,
        "n_groups": m.num_groups,
        "num_heads": m.expand * config.hidden_size // m.head_dim,
        "rms_norm": True,
        "time_step_limit": list(m.dt_limit),
        "use_bias": m.use_bias,
        "use_conv_bias": m.conv_bias,
    }


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Mamba-2 model."""
    layer = "backbone.layers.{i}.mixer."
    return [
        *common_table(config, use_bias=config.mamba2.use_bias, conv_bias=config.mamba2.conv_bias),
        Entry(f"{layer}dt_bias", "mixer.dt_bias"),
        Entry(f"{layer}norm.weight", "mixer.norm.scale"),
    ]
