"""Llama checkpoints (`LlamaForCausalLM`): attention over the whole past, and gated feed-forward blocks."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, expect, flag, integer, number, refuse, transposed
from tttlm.model import AttentionConfig, ModelConfig

model_type = "llama"
MIXERS = {"attention": "attention"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the defaults of `transformers`."""
    num_heads, hidden_size = integer(values, "num_attention_heads", 32), integer(values, "hidden_size", 4096)
    expect(values, hidden_act="silu")
    refuse(values, "sliding_window", "quantization_config")
    return ModelConfig(
        vocab_size=integer(values, "vocab_size", 32_000),
        hidden_size=hidden_size,
        num_layers=integer(values, "num_hidden_layers", 32),
        num_heads=num_heads,
        intermediate_size=integer(values, "intermediate_size", 11_008),
        feed_forward_bias=flag(values, "mlp_bias", False),
        mixers=("attention",),
        backbone="transformer",
        tie_embeddings=flag(values, "tie_word_embeddings", False),
        rope_theta=_rope_base(values),
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        initializer_range=number(values, "initializer_range", 0.02),
        attention=AttentionConfig(
            num_kv_heads=integer(values, "num_key_value_heads", num_heads),
            head_dim=integer(values, "head_dim", max(1, hidden_size // num_heads)),
            use_bias=flag(values, "attention_bias", False),
            max_length=integer(values, "max_position_embeddings", 2048),
        ),
    )


def _rope_base(values: dict[str, Any]) -> float:
    """The base of plain rotary embeddings over whole heads; every other kind is refused."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise InputError(f"config.json: {name} must be an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(f"config.json: rotary embeddings of type {kind!r} are not known here; only the default is")
        for place in (rope, values):
            expect(place, partial_rotary_factor=1.0)
    return number(values, "rope_theta", number(values.get("rope_parameters") or {}, "rope_theta", 10_000.0))


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    if config.attention.qk_norm or config.conv_before(config.mixer("attention")) or not config.intermediate_size:
        raise InputError("a Llama checkpoint has feed-forward blocks, and neither QK norm nor convolutions")
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads or config.num_heads,
        "head_dim": config.attention.head_dim or config.hidden_size // config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "attention_bias": config.attention.use_bias,
        "mlp_bias": config.feed_forward_bias,
        "max_position_embeddings": config.attention.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
    }


def table(config: ModelConfig) -> list[Entry]:
    """All parameters of a Llama model."""
    block = "model.layers.{i}."
    entries = [
        Entry("model.embed_tokens.weight", "embed.embedding"),
        Entry("model.norm.weight", "norm.scale"),
        Entry(f"{block}input_layernorm.weight", "mixer_norm.scale"),
        Entry(f"{block}post_attention_layernorm.weight", "feed_forward_norm.scale"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        entries.append(transposed(f"{block}self_attn.{name}.weight", f"mixer.{name}.kernel"))
        if config.attention.use_bias:
            entries.append(Entry(f"{block}self_attn.{name}.bias", f"mixer.{name}.bias"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        entries.append(transposed(f"{block}mlp.{name}.weight", f"feed_forward.{name}.kernel"))
        if config.feed_forward_bias:
            entries.append(Entry(f"{block}mlp.{name}.bias", f"feed_forward.{name}.bias"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "lm_head.embedding"))
    return entries
