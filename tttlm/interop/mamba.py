"""Mamba checkpoints: blocks of one mixer each, no feed-forward blocks.

They come in two layouts: that of Hugging Face (`MambaForCausalLM`), and that of the authors' code (the package
`mamba_ssm`), whose config.json has `d_model`, `n_layer` and `ssm_cfg`.
"""

from dataclasses import replace
from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import (
    Architecture,
    Entry,
    depthwise,
    expect,
    flag,
    integer,
    number,
    only,
    refuse,
    transposed,
)
from tttlm.model import MambaConfig, ModelConfig


def _config(values: dict[str, Any]) -> ModelConfig:
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


def _values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        **common_values(config),
        "state_size": config.mamba.state_size,
        "expand": config.mamba.expand,
        "intermediate_size": config.mamba.expand * config.hidden_size,
        "time_step_rank": config.mamba.dt_rank or -(-config.hidden_size // 16),
        "use_bias": config.mamba.use_bias,
        "use_conv_bias": config.mamba.conv_bias,
    }


def _table(config: ModelConfig) -> list[Entry]:
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


def check_blocks(config: ModelConfig) -> None:
    """Refuses a model with anything beside its mixers."""
    if config.intermediate_size or config.conv_before(config.pattern[0]):
        raise InputError(
            f"a Mamba checkpoint has no feed-forward blocks, got model.intermediate_size = {config.intermediate_size}"
        )


def common_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    check_blocks(config)
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


def _authors_config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what the authors' config.json says; what it leaves out has the defaults of their code."""
    ssm = ssm_values(values, layer="Mamba1", known=("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"))
    auto = ssm.get("dt_rank") in (None, "auto")
    return ModelConfig(
        **authors_common_config(values, ssm, tied=True),
        mixers=("mamba",),
        mamba=MambaConfig(
            state_size=integer(ssm, "d_state", 16),
            expand=integer(ssm, "expand", 2),
            dt_rank=None if auto else integer(ssm, "dt_rank"),
            use_bias=flag(ssm, "bias", False),
            conv_bias=flag(ssm, "conv_bias", True),
        ),
    )


def _authors_values(config: ModelConfig) -> dict[str, Any]:
    """What the authors' config.json says of our configuration."""
    ssm = {
        "layer": "Mamba1",
        "d_state": config.mamba.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.mamba.expand,
        "dt_rank": config.mamba.dt_rank or "auto",
        "bias": config.mamba.use_bias,
        "conv_bias": config.mamba.conv_bias,
    }
    return authors_common_values(config, ssm)


# What changes how a layer starts or is computed, and nothing of what is computed.
_NO_MATTER = (
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "chunk_size", "conv_init"),
    *("use_fast_path", "use_mem_eff_path", "device", "dtype"),
)


def ssm_values(values: dict[str, Any], *, layer: str, known: tuple[str, ...]) -> dict[str, Any]:
    """What the authors' `ssm_cfg` says of a layer.

    Raises:
        InputError: it is no object, or has a field that is not supported.
    """
    ssm = values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise InputError(f"config.json: ssm_cfg must be an object, got {ssm!r}")
    for name in ssm:
        if name not in (*known, *_NO_MATTER, "layer"):
            raise InputError(f"config.json: ssm_cfg.{name} is not supported for a {layer} layer, got {ssm[name]!r}")
    return {"model_type": layer, **ssm}


def authors_common_config(values: dict[str, Any], ssm: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """What both Mambas have in common in the authors' configuration.

    The embedding has as many rows as `vocab_size` rounded up to a multiple of `pad_vocab_size_multiple`.
    """
    expect(values, rms_norm=True)
    refuse(values, "attn_layer_idx", "d_intermediate")
    vocab_size, multiple = integer(values, "vocab_size", 50_277), integer(values, "pad_vocab_size_multiple", 8)
    return {
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "hidden_size": integer(values, "d_model", 2560),
        "num_layers": integer(values, "n_layer", 64),
        "intermediate_size": 0,
        "conv_kernel": integer(ssm, "d_conv", 4),
        "tie_embeddings": flag(values, "tie_embeddings", tied),
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
    }


def authors_common_values(config: ModelConfig, ssm: dict[str, Any]) -> dict[str, Any]:
    """The other way round."""
    check_blocks(config)
    if config.norm_eps != 1e-5:
        raise InputError(f"the authors' layout of Mamba has norms of eps 1e-5, got model.norm_eps = {config.norm_eps}")
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }


def authors_names(table: list[Entry]) -> list[Entry]:
    """The same parameters under the authors' names."""
    there = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    return [replace(entry, name=there.get(entry.name, entry.name)) for entry in table]


MAMBA = Architecture("mamba", _config, _values, _table, lambda config: only(config, "mamba"))
MAMBA_SSM = Architecture(
    "mamba_ssm",
    _authors_config,
    _authors_values,
    lambda config: authors_names(_table(config)),
    MAMBA.holds,
    "mamba_ssm",
)
