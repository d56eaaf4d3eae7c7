"""Mamba-2 checkpoints, in the layout of Hugging Face (`Mamba2ForCausalLM`) and in that of the authors' code."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Architecture, Entry, expect, flag, integer, only
from tttlm.interop.mamba import (
    authors_common_config,
    authors_common_values,
    authors_names,
    common_config,
    common_table,
    common_values,
    ssm_values,
)
from tttlm.model import Mamba2Config, ModelConfig


def _config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the defaults of `transformers`."""
    expect(values, rms_norm=True)
    shared = common_config(values, vocab_size=32_768, hidden_size=4096, num_layers=64, tied=False)
    mamba2 = Mamba2Config(
        state_size=integer(values, "state_size", 128),
        head_dim=integer(values, "head_dim", 64),
        expand=integer(values, "expand", 2),
        num_groups=integer(values, "n_groups", 8),
        dt_limit=_dt_limit(values, "time_step_limit"),
        use_bias=flag(values, "use_bias", False),
        conv_bias=flag(values, "use_conv_bias", True),
    )
    num_heads = mamba2.expand * shared["hidden_size"] // mamba2.head_dim
    if (given := integer(values, "num_heads", 128)) != num_heads:
        raise InputError(f"config.json: num_heads must be expand * hidden_size / head_dim = {num_heads}, got {given}")
    return ModelConfig(**shared, mixers=("mamba2",), mamba2=mamba2)


def _dt_limit(values: dict[str, Any], name: str) -> tuple[float, float]:
    """JSON has no number for infinity: some writers spell it as a word, `transformers` 5 as an object with one."""
    limit = values.get(name) or (0.0, "inf")
    try:
        low, high = (float(part["__float__"] if isinstance(part, dict) else part) for part in limit)
    except (TypeError, ValueError, KeyError):
        raise InputError(f"config.json: {name} must be two numbers, got {limit!r}") from None
    return low, high


def _values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    m = config.mamba2
    if m.norm_groups != 1:
        raise InputError(
            f"the norm of a Mamba-2 checkpoint has one group, got model.mamba2.norm_groups = {m.norm_groups}"
        )
    limit = {} if m.dt_limit == (0.0, float("inf")) else {"time_step_limit": list(m.dt_limit)}
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **common_values(config),
        "state_size": m.state_size,
        "head_dim": m.head_dim,
        "expand": m.expand,
        "n_groups": m.num_groups,
        "num_heads": m.expand * config.hidden_size // m.head_dim,
        "rms_norm": True,
        **limit,
        "use_bias": m.use_bias,
        "use_conv_bias": m.conv_bias,
    }


def _table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Mamba-2 model."""
    layer = "backbone.layers.{i}.mixer."
    return [
        *common_table(config, use_bias=config.mamba2.use_bias, conv_bias=config.mamba2.conv_bias),
        Entry(f"{layer}dt_bias", "mixer.dt_bias"),
        Entry(f"{layer}norm.weight", "mixer.norm.scale"),
    ]


_AUTHORS = ("d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate")


def _authors_config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what the authors' config.json says; what it leaves out has the defaults of their code."""
    ssm = ssm_values(values, layer="Mamba2", known=(*_AUTHORS, "dt_limit", "bias", "conv_bias"))
    expect(ssm, rmsnorm=True, norm_before_gate=False, D_has_hdim=False)
    shared = authors_common_config(values, ssm, tied=True)
    expect(ssm, d_ssm=integer(ssm, "expand", 2) * shared["hidden_size"])
    groups = integer(ssm, "ngroups", 1)
    mamba2 = Mamba2Config(
        state_size=integer(ssm, "d_state", 128),
        head_dim=integer(ssm, "headdim", 64),
        expand=integer(ssm, "expand", 2),
        num_groups=groups,
        norm_groups=groups,
        dt_limit=_dt_limit(ssm, "dt_limit"),
        use_bias=flag(ssm, "bias", False),
        conv_bias=flag(ssm, "conv_bias", True),
    )
    return ModelConfig(**shared, mixers=("mamba2",), mamba2=mamba2)


def _authors_values(config: ModelConfig) -> dict[str, Any]:
    """What the authors' config.json says of our configuration."""
    m = config.mamba2
    if m.norm_groups != m.num_groups:
        raise InputError(
            "the norm of a Mamba-2 layer in its authors' layout has as many groups as the layer, got "
            f"model.mamba2.num_groups = {m.num_groups} and norm_groups = {m.norm_groups}"
        )
    ssm: dict[str, Any] = {
        "layer": "Mamba2",
        "d_state": m.state_size,
        "d_conv": config.conv_kernel,
        "headdim": m.head_dim,
        "expand": m.expand,
        "ngroups": m.num_groups,
        "bias": m.use_bias,
        "conv_bias": m.conv_bias,
    }
    if m.dt_limit != (0.0, float("inf")):
        ssm["dt_limit"] = list(m.dt_limit)
    return authors_common_values(config, ssm)


MAMBA2 = Architecture("mamba2", _config, _values, _table, lambda config: only(config, "mamba2"))
MAMBA2_SSM = Architecture(
    "mamba2_ssm",
    _authors_config,
    _authors_values,
    lambda config: authors_names(_table(config)),
    MAMBA2.holds,
    "mamba_ssm",
)
