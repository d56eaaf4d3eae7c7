"""Checkpoints of Llama 2 and 3, SmolLM and SmolLM2 (`llama`), Qwen 2 and 2.5 (`qwen2`) and Qwen 3 (`qwen3`).

They are attention over the whole past and gated feed-forward blocks. Qwen 2 has biases in the projections of queries,
keys and values, Qwen 3 an RMSNorm of every query and key.
"""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Architecture, Entry, expect, flag, integer, number, only, refuse, transposed
from tttlm.model import AttentionConfig, ModelConfig
from tttlm.ops.rope import RopeScaling


def _llama_config(values: dict[str, Any]) -> ModelConfig:
    bias = flag(values, "attention_bias", False)
    refuse(values, "sliding_window")
    hidden_size, num_heads = integer(values, "hidden_size", 4096), integer(values, "num_attention_heads", 32)
    return _config(
        values,
        vocab_size=32_000,
        intermediate_size=11_008,
        num_kv_heads=num_heads,
        max_length=2048,
        attention={"use_bias": bias, "head_dim": integer(values, "head_dim", max(1, hidden_size // num_heads))},
        feed_forward_bias=flag(values, "mlp_bias", False),
    )


def _qwen2_config(values: dict[str, Any]) -> ModelConfig:
    _full_attention(values)
    return _config(
        values,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_kv_heads=32,
        max_length=32_768,
        attention={"use_bias": True, "out_bias": False},
    )


def _qwen3_config(values: dict[str, Any]) -> ModelConfig:
    _full_attention(values)
    return _config(
        values,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_kv_heads=32,
        max_length=32_768,
        attention={
            "use_bias": flag(values, "attention_bias", False),
            "qk_norm": True,
            "head_dim": integer(values, "head_dim", 128),
        },
    )


def _full_attention(values: dict[str, Any]) -> None:
    """Refuses the Qwen models some of whose layers see a window only."""
    expect(values, use_sliding_window=False)
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(f"config.json: layer_types must all be 'full_attention', got {kinds!r:.80}")


def _config(
    values: dict[str, Any],
    *,
    vocab_size: int,
    intermediate_size: int,
    num_kv_heads: int,
    max_length: int,
    attention: dict[str, Any],
    **more: Any,
) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the defaults of `transformers`."""
    num_heads = integer(values, "num_attention_heads", 32)
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        num_kv_heads = num_heads
    expect(values, hidden_act="silu")
    refuse(values, "quantization_config")
    max_length = integer(values, "max_position_embeddings", max_length)
    rope_theta, scaling = _rope(values, max_length)
    return ModelConfig(
        vocab_size=integer(values, "vocab_size", vocab_size),
        hidden_size=integer(values, "hidden_size", 4096),
        num_layers=integer(values, "num_hidden_layers", 32),
        num_heads=num_heads,
        intermediate_size=integer(values, "intermediate_size", intermediate_size),
        mixers=("attention",),
        backbone="transformer",
        tie_embeddings=flag(values, "tie_word_embeddings", False),
        rope_theta=rope_theta,
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        initializer_range=number(values, "initializer_range", 0.02),
        attention=AttentionConfig(
            num_kv_heads=integer(values, "num_key_value_heads", num_kv_heads),
            max_length=max_length,
            rope_scaling=scaling,
            **attention,
        ),
        **more,
    )


def _rope(values: dict[str, Any], max_length: int) -> tuple[float, RopeScaling]:
    """Base and scaling of rotary embeddings over whole heads, plain or of Llama 3; every other kind is refused.

    They stand in `rope_theta` and `rope_scaling` or, as `transformers` 5 writes them, both in `rope_parameters`.
    """
    scaling = RopeScaling()
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise InputError(f"config.json: {name} must be an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(
                f"config.json: rotary embeddings of type {kind!r} are not supported; only the default and 'llama3' are"
            )
        for place in (rope, values):
            expect(place, partial_rotary_factor=1.0)
        if kind == "llama3":
            if missing := [key for key in ("factor", "low_freq_factor", "high_freq_factor") if rope.get(key) is None]:
                raise InputError(f"config.json: {name} of type 'llama3' has no {missing[0]!r}, which it needs")
            scaling = RopeScaling(
                factor=number(rope, "factor", 1.0),
                low_freq_factor=number(rope, "low_freq_factor", 1.0),
                high_freq_factor=number(rope, "high_freq_factor", 1.0),
                original_max_length=integer(rope, "original_max_position_embeddings", max_length),
            )
    theta = number(values, "rope_theta", number(values.get("rope_parameters") or {}, "rope_theta", 10_000.0))
    return theta, scaling


def _values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration in all three families."""
    if config.conv_before(config.mixer("attention")) or not config.intermediate_size:
        raise InputError("a Llama-like checkpoint has feed-forward blocks and no convolutions")
    scaling = config.attention.rope_scaling
    rope = None
    if scaling.factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads or config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.attention.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
    }


def _head_dim(config: ModelConfig) -> int:
    return config.attention.head_dim or config.hidden_size // config.num_heads


def _llama_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_values(config),
        "head_dim": _head_dim(config),
        "attention_bias": config.attention.use_bias,
        "mlp_bias": config.feed_forward_bias,
    }


def _qwen2_values(config: ModelConfig) -> dict[str, Any]:
    if _head_dim(config) * config.num_heads != config.hidden_size or config.feed_forward_bias:
        raise InputError("a Qwen 2 checkpoint has heads that fill hidden_size, and no biases in feed-forward blocks")
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_values(config),
        "use_sliding_window": False,
    }


def _qwen3_values(config: ModelConfig) -> dict[str, Any]:
    if config.feed_forward_bias:
        raise InputError("a Qwen 3 checkpoint has no biases in feed-forward blocks")
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        **_values(config),
        "head_dim": _head_dim(config),
        "attention_bias": config.attention.use_bias,
        "use_sliding_window": False,
    }


def _table(config: ModelConfig) -> list[Entry]:
    """All parameters; what a family does not have, its configuration does not either."""
    block, attention = "model.layers.{i}.", config.attention
    out_bias = attention.use_bias if attention.out_bias is None else attention.out_bias
    entries = [
        Entry("model.embed_tokens.weight", "embed.embedding"),
        Entry("model.norm.weight", "norm.scale"),
        Entry(f"{block}input_layernorm.weight", "mixer_norm.scale"),
        Entry(f"{block}post_attention_layernorm.weight", "feed_forward_norm.scale"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        entries.append(transposed(f"{block}self_attn.{name}.weight", f"mixer.{name}.kernel"))
        if out_bias if name == "o_proj" else attention.use_bias:
            entries.append(Entry(f"{block}self_attn.{name}.bias", f"mixer.{name}.bias"))
    if attention.qk_norm:
        entries += [Entry(f"{block}self_attn.{name}.weight", f"mixer.{name}.scale") for name in ("q_norm", "k_norm")]
    for name in ("gate_proj", "up_proj", "down_proj"):
        entries.append(transposed(f"{block}mlp.{name}.weight", f"feed_forward.{name}.kernel"))
        if config.feed_forward_bias:
            entries.append(Entry(f"{block}mlp.{name}.bias", f"feed_forward.{name}.bias"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "lm_head.embedding"))
    return entries


def _uniform_bias(config: ModelConfig) -> bool:
    return config.attention.out_bias in (None, config.attention.use_bias)


def _is_llama(config: ModelConfig) -> bool:
    return only(config, "attention") and not config.attention.qk_norm and _uniform_bias(config)


def _is_qwen2(config: ModelConfig) -> bool:
    biases = config.attention.use_bias and config.attention.out_bias is False
    return only(config, "attention") and not config.attention.qk_norm and biases


def _is_qwen3(config: ModelConfig) -> bool:
    return only(config, "attention") and config.attention.qk_norm and _uniform_bias(config)


LLAMA = Architecture("llama", _llama_config, _llama_values, _table, _is_llama)
QWEN2 = Architecture("qwen2", _qwen2_config, _qwen2_values, _table, _is_qwen2)
QWEN3 = Architecture("qwen3", _qwen3_config, _qwen3_values, _table, _is_qwen3)
