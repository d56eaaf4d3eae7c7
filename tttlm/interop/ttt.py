"""Released TTT models (`model_type: ttt`), with Transformer and Mamba backbone."""

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
from tttlm.mixers.ttt import TTTConfig, TTTMixer
from tttlm.model import ModelConfig

MIXERS = {"linear": "ttt_linear", "mlp": "ttt_mlp"}


def _config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what config.json says; what it leaves out has the released code's defaults."""
    kind = values.get("ttt_layer_type", "linear")
    if kind not in MIXERS:
        raise InputError(f"config.json: ttt_layer_type must be one of {sorted(MIXERS)}, got {kind!r}")
    expect(values, hidden_act="silu")
    refuse(values, "rope_scaling", "quantization_config")
    share_qk, gate = flag(values, "share_qk", False), flag(values, "use_gate", False)
    return ModelConfig(
        vocab_size=integer(values, "vocab_size", 32_000),
        hidden_size=integer(values, "hidden_size", 2048),
        num_layers=integer(values, "num_hidden_layers", 24),
        num_heads=integer(values, "num_attention_heads", 32),
        intermediate_size=integer(values, "intermediate_size", 5504),
        mixers=(MIXERS[kind],),  # type: ignore[arg-type]
        backbone="mamba" if share_qk and gate else "transformer",
        conv_before_block=flag(values, "pre_conv", False),
        conv_kernel=integer(values, "conv_kernel", 4),
        tie_embeddings=flag(values, "tie_word_embeddings", True),
        rope_theta=number(values, "rope_theta", 10_000.0),
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        initializer_range=number(values, "initializer_range", 0.02),
        ttt=TTTConfig(
            mini_batch_size=integer(values, "mini_batch_size", 16),
            inner_learning_rate=number(values, "ttt_base_lr", 1.0),
            share_qk=share_qk,
            gate=gate,
        ),
    )


def _values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of our configuration."""
    mixer = released_mixer(config)
    kinds = {ours: theirs for theirs, ours in MIXERS.items()}
    return {
        "model_type": "ttt",
        "architectures": ["TTTForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "ttt_layer_type": kinds[mixer.name],
        "ttt_base_lr": mixer.inner_learning_rate,
        "mini_batch_size": config.ttt.mini_batch_size,
        "pre_conv": config.conv_before(mixer),
        "conv_kernel": config.conv_kernel,
        "share_qk": mixer.share_qk,
        "use_gate": mixer.gate,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
    }


def released_mixer(config: ModelConfig) -> TTTMixer:
    """The mixer of a model, which has to be one that was released.

    Raises:
        InputError: no released TTT model has such a layer.
    """
    ttt = config.ttt
    if not (ttt.inner_norm and ttt.inner_bias and ttt.learned_start and ttt.learned_rate):
        raise InputError("a TTT checkpoint has an inner norm and biases, and learned initial weights and rates")
    (name,) = set(config.mixers)
    mixer = config.mixer(name)
    assert isinstance(mixer, TTTMixer)
    return mixer


def _table(config: ModelConfig) -> list[Entry]:
    """All parameters of a TTT model."""
    mixer = released_mixer(config)
    block, layer = "model.layers.{i}.", "model.layers.{i}.seq_modeling_block."
    entries = [
        Entry("model.embed_tokens.weight", "embed.embedding"),
        Entry("model.norm.weight", "norm.scale"),
        Entry(f"{block}seq_norm.weight", "mixer_norm.scale"),
        Entry(f"{block}ffn_norm.weight", "feed_forward_norm.scale"),
        *(transposed(f"{block}mlp.{name}.weight", f"feed_forward.{name}.kernel") for name in FEED_FORWARD),
        *(transposed(f"{layer}{name}.weight", f"mixer.{name}.kernel") for name in ("q_proj", "v_proj", "o_proj")),
        Entry(f"{layer}learnable_token_idx", "mixer.token_scale"),
        Entry(
            f"{layer}learnable_ttt_lr_weight",
            "mixer.learning_rate.kernel",
            lambda a: a[:, 0].T,
            lambda a: a.T[:, None],
        ),
        Entry(f"{layer}learnable_ttt_lr_bias", "mixer.learning_rate.bias", lambda a: a[:, 0], lambda a: a[:, None]),
        Entry(f"{layer}ttt_norm_weight", "mixer.inner_norm.scale"),
        Entry(f"{layer}ttt_norm_bias", "mixer.inner_norm.bias"),
        Entry(f"{layer}post_norm.weight", "mixer.post_norm.scale"),
        Entry(f"{layer}post_norm.bias", "mixer.post_norm.bias"),
    ]
    for i in range(len(mixer.inner_sizes) - 1):
        entries.append(Entry(f"{layer}W{i + 1}", f"mixer.inner.{i}.kernel"))
        entries.append(Entry(f"{layer}b{i + 1}", f"mixer.inner.{i}.bias", lambda a: a[:, 0], lambda a: a[:, None]))
    if mixer.share_qk:
        for name in ("conv_q", "conv_k"):
            entries.append(depthwise(f"{layer}{name}.weight", f"mixer.{name}.kernel"))
            entries.append(Entry(f"{layer}{name}.bias", f"mixer.{name}.bias"))
    else:
        entries.append(transposed(f"{layer}k_proj.weight", "mixer.k_proj.kernel"))
    if mixer.gate:
        entries.append(transposed(f"{layer}g_proj.weight", "mixer.g_proj.kernel"))
    if config.conv_before(mixer):
        entries.append(Entry(f"{block}conv.norm.weight", "conv_norm.scale"))
        entries.append(depthwise(f"{block}conv.conv.weight", "conv.kernel"))
        entries.append(Entry(f"{block}conv.conv.bias", "conv.bias"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "lm_head.embedding"))
    return entries


FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

TTT = Architecture("ttt", _config, _values, _table, lambda config: only(config, *MIXERS.values()))
