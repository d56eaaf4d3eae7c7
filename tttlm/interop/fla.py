"""Checkpoints of flash-linear-attention in its Hugging Face layout: DeltaNet, Gated DeltaNet, KDA and GLA."""

from collections.abc import Callable
from functools import partial
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
from tttlm.mixers.learners import GLAConfig, KDAConfig, LearnerMixer
from tttlm.model import ModelConfig

Values = dict[str, Any]


def _config(
    name: str, options: Callable[[Values, int, int], Values], num_layers: int, num_heads: int, values: Values
) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the library's defaults.

    `options` gives the mixer's own, from the file, the hidden size and the number of heads.
    """
    expect(values, hidden_act="swish")
    refuse(values, "attn", "attnres_block_size", "quantization_config")
    hidden_size, num_heads = integer(values, "hidden_size", 2048), integer(values, "num_heads", num_heads)
    for groups in ("num_v_heads", "num_kv_heads"):
        if (found := integer(values, groups, num_heads)) != num_heads:
            raise InputError(f"config.json: {groups} must be num_heads, {num_heads}, or left out, got {found}")
    # A multiple of 256 that is not below 2/3 of hidden_ratio.
    intermediate_size = 256 * -(-int(hidden_size * number(values, "hidden_ratio", 4) * 2 / 3) // 256)
    given = {"conv_kernel": integer(values, "conv_size", 4)}
    if not flag(values, "use_short_conv", name != "gla"):
        given = {"conv_kernel": 0}
    return ModelConfig(
        vocab_size=integer(values, "vocab_size", 32_000),
        hidden_size=hidden_size,
        num_layers=integer(values, "num_hidden_layers", num_layers),
        num_heads=num_heads,
        intermediate_size=integer(values, "intermediate_size", intermediate_size),
        mixers=(name,),
        backbone="transformer",
        tie_embeddings=flag(values, "tie_word_embeddings", False),
        norm_eps=number(values, "norm_eps", 1e-6),
        initializer_range=number(values, "initializer_range", 0.02),
        mixer_options={name: given | options(values, hidden_size, num_heads)},
    )


def _expanded(values: Values, hidden_size: int, num_heads: int, expand_k: float) -> Values:
    """Sizes of heads where config.json gives them in parts of the hidden size."""
    parts = (number(values, "expand_k", expand_k), number(values, "expand_v", 1.0))
    head_dim, value_dim = (int(hidden_size * part) // num_heads for part in parts)
    return {"head_dim": head_dim, "value_dim": value_dim}


def _headed(values: Values, head_dim: int, expand_v: float) -> Values:
    """Sizes of heads where config.json gives the size of a key."""
    head_dim = integer(values, "head_dim", head_dim)
    return {"head_dim": head_dim, "value_dim": int(head_dim * number(values, "expand_v", expand_v))}


def _deltanet(values: Values, hidden_size: int, num_heads: int) -> Values:
    expect(values, use_beta=True, use_output_norm=True, qk_norm="l2", qk_activation="silu")
    return {
        **_expanded(values, hidden_size, num_heads, 1.0),
        "gate": flag(values, "use_gate", False),
        "allow_neg_eigval": flag(values, "allow_neg_eigval", False),
    }


def _gated_deltanet(values: Values, hidden_size: int, num_heads: int) -> Values:
    return {
        **_headed(values, 256, 2.0),
        "gate": flag(values, "use_gate", True),
        "allow_neg_eigval": flag(values, "allow_neg_eigval", False),
    }


def _kda(values: Values, hidden_size: int, num_heads: int) -> Values:
    bound = values.get("lower_bound")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound < 0):
        raise InputError(f"config.json: lower_bound must be a negative number, got {bound!r}")
    if bound is None:
        expect(values, safe_gate=False)
    return {
        **_headed(values, 128, 1.0),
        "allow_neg_eigval": flag(values, "allow_neg_eigval", False),
        "lower_bound": None if bound is None else float(bound),
    }


def _gla(values: Values, hidden_size: int, num_heads: int) -> Values:
    expect(values, use_output_gate=True, elementwise_affine=True, use_gk=True, use_gv=False)
    refuse(values, "feature_map", "clamp_min")
    return _expanded(values, hidden_size, num_heads, 0.5)


def _settings(config: ModelConfig) -> tuple[Any, int, int]:
    """The mixer's configuration, and the sizes of a key and of a value."""
    mixer = config.mixer(config.mixers[0])
    assert isinstance(mixer, LearnerMixer)
    return mixer.config, *mixer.layer.head_sizes(config.hidden_size, config.num_heads, mixer.config)


def _values(model_type: str, architecture: str, config: ModelConfig) -> Values:
    """What config.json says of our configuration."""
    settings, head_dim, value_dim = _settings(config)
    if not config.intermediate_size or config.feed_forward_bias or config.conv_before(config.pattern[0]):
        raise InputError(f"a {model_type} checkpoint has feed-forward blocks without biases, and no convolution before")
    values: Values = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "tie_word_embeddings": config.tie_embeddings,
        "norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "use_short_conv": settings.conv_kernel > 0,
        "conv_size": settings.conv_kernel or 4,
    }
    if model_type in ("gla", "delta_net"):
        sizes = (size * config.num_heads / config.hidden_size for size in (head_dim, value_dim))
        values |= dict(zip(("expand_k", "expand_v"), sizes, strict=True))
    else:
        values |= {"head_dim": head_dim, "expand_v": value_dim / head_dim}
    if isinstance(settings, GLAConfig):
        if (settings.gate_rank, settings.gate_normalizer) != (16, 16.0):
            raise InputError(
                "a GLA checkpoint has gate_rank 16 and gate_normalizer 16, "
                f"got {settings.gate_rank} and {settings.gate_normalizer}"
            )
        return values
    values["allow_neg_eigval"] = settings.allow_neg_eigval
    if isinstance(settings, KDAConfig):
        bound = settings.lower_bound
        return values | {"lower_bound": bound, "safe_gate": bound is not None and bound >= -5}
    return values | {"use_gate": settings.gate}


def _table(config: ModelConfig) -> list[Entry]:
    """All parameters."""
    name, (settings, _, _) = config.mixers[0], _settings(config)
    block, layer = "model.layers.{i}.", "model.layers.{i}.attn."
    entries = [
        Entry("model.embeddings.weight", "embed.embedding"),
        Entry("model.norm.weight", "norm.scale"),
        Entry(f"{block}attn_norm.weight", "mixer_norm.scale"),
        Entry(f"{block}mlp_norm.weight", "feed_forward_norm.scale"),
        *(
            transposed(f"{block}mlp.{p}.weight", f"feed_forward.{p}.kernel")
            for p in ("gate_proj", "up_proj", "down_proj")
        ),
        *(transposed(f"{layer}{p}.weight", f"mixer.{p}.kernel") for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
        Entry(f"{layer}{'g_norm_swish_gate' if name == 'gla' else 'o_norm'}.weight", "mixer.o_norm"),
    ]
    if settings.conv_kernel:
        entries += [depthwise(f"{layer}{c}_conv1d.weight", f"mixer.conv_{c}.kernel") for c in "qkv"]
    memory = "mixer.memories.0."
    if name != "gla":
        entries.append(transposed(f"{layer}b_proj.weight", f"{memory}rate.up_proj.kernel"))
    if name in ("gated_deltanet", "kda"):
        entries.append(Entry(f"{layer}A_log", f"{memory}decay.log_scale"))
        entries.append(Entry(f"{layer}dt_bias", f"{memory}decay.bias"))
    if name == "gated_deltanet":
        entries.append(transposed(f"{layer}a_proj.weight", f"{memory}decay.up_proj.kernel"))
    if name in ("kda", "gla"):
        gate = "f_proj" if name == "kda" else "gk_proj"
        entries.append(transposed(f"{layer}{gate}.0.weight", f"{memory}decay.down_proj.kernel"))
        entries.append(transposed(f"{layer}{gate}.1.weight", f"{memory}decay.up_proj.kernel"))
    if name == "gla":
        entries.append(Entry(f"{layer}gk_proj.1.bias", f"{memory}decay.bias"))
    if name == "kda":
        entries.append(transposed(f"{layer}g_proj.0.weight", "mixer.g_down.kernel"))
        entries.append(transposed(f"{layer}g_proj.1.weight", "mixer.g_proj.kernel"))
        entries.append(Entry(f"{layer}g_proj.1.bias", "mixer.g_proj.bias"))
    elif name == "gla" or settings.gate:
        entries.append(transposed(f"{layer}g_proj.weight", "mixer.g_proj.kernel"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "lm_head.embedding"))
    return entries


def _architecture(
    model_type: str,
    mixer: str,
    options: Callable[[Values, int, int], Values],
    layers: int,
    heads: int,
    architecture: str,
) -> Architecture:
    return Architecture(
        model_type,
        partial(_config, mixer, options, layers, heads),
        partial(_values, model_type, architecture),
        _table,
        lambda config: only(config, mixer),
    )


DELTANET = _architecture("delta_net", "deltanet", _deltanet, 24, 16, "DeltaNetForCausalLM")
GATED_DELTANET = _architecture("gated_deltanet", "gated_deltanet", _gated_deltanet, 21, 6, "GatedDeltaNetForCausalLM")
KDA = _architecture("kda", "kda", _kda, 24, 16, "KDAForCausalLM")
GLA = _architecture("gla", "gla", _gla, 24, 4, "GLAForCausalLM")
