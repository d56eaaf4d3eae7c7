"""Llama checkpoints (`LlamaForCausalLM`): attention over the whole past, and gated feed-forward blocks."""

from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Entry, expect, required, transposed
from tttlm.model import AttentionConfig, ModelConfig

model_type = "llama"
MIXERS = {"attention": "attention"}


def config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json: rotary embeddings of type {kind!r} are not known here; only the default is")
    expect(values, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return ModelConfig(
        vocab_size=required(values, "vocab_size"),
        width=required(values, "hidden_size"),
        layers=required(values, "num_hidden_layers"),
        heads=required(values, "num_attention_heads"),
        feed_forward=required(values, "intermediate_size"),
        mixers=("attention",),
        backbone="transformer",
        tie_embeddings=values.get("tie_word_embeddings", False),
        rope_base=values.get("rope_theta") or rope.get("rope_theta", 10_000.0),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        init_std=values.get("initializer_range", 0.02),
        attention=AttentionConfig(
            kv_heads=values.get("num_key_value_heads"),
            head_width=values.get("head_dim"),
            max_length=values.get("max_position_embeddings", 2048),
        ),
    )


def values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    if config.attention.qk_norm or config.conv_before("attention") or not config.feed_forward:
        raise InputError("a Llama checkpoint has feed-forward blocks, and neither QK norm nor convolutions")
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.attention.kv_heads or config.heads,
        "head_dim": config.attention.head_width or config.width // config.heads,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "max_position_embeddings": config.attention.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
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
    for name in ("gate_proj", "up_proj", "down_proj"):
        entries.append(transposed(f"{block}mlp.{name}.weight", f"feed_forward.{name}.kernel"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "lm_head.embedding"))
    return entries
