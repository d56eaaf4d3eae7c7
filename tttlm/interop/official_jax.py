"""Checkpoints of the official JAX trainer of TTT models: a stream of arrays beside `model_config.json`.

`streaming_params` has the keys `model ...`, `streaming_train_state` has them below `params params`, with the state of
the optimiser beside them. Dense kernels are `[in, out]` and convolutions `[W, 1, D]`, as Flax has them. Both the
Transformer (`self_attention`) and TTT turn interleaved pairs by rotary embeddings; our attention turns halves, so that
its projections of queries and keys are permuted on the way.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tttlm.errors import InputError
from tttlm.interop.architecture import Architecture, Entry, expect, flag, integer, number, only, transposed
from tttlm.interop.stream import Record, read_stream, write_stream
from tttlm.interop.tensors import Tensors, Written
from tttlm.interop.ttt import released_mixer
from tttlm.mixers.ttt import TTTConfig
from tttlm.model import AttentionConfig, ModelConfig

CONFIG = "model_config.json"
_BLOCKS = {  # seq_modeling_block: mixer, backbone
    "ttt_linear": ("ttt_linear", "mamba"),
    "ttt_mlp": ("ttt_mlp", "mamba"),
    "ttt_linear_base": ("ttt_linear", "transformer"),
    "ttt_mlp_base": ("ttt_mlp", "transformer"),
    "self_attention": ("attention", "transformer"),
}
_NAME = re.compile(r"streaming_(params|train_state)(_\d+)?")


def _config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of what model_config.json says; what it leaves out has the trainer's defaults."""
    kind = values.get("seq_modeling_block")
    if not isinstance(kind, str) or kind not in _BLOCKS:
        raise InputError(f"{CONFIG}: seq_modeling_block must be one of {', '.join(_BLOCKS)}, got {kind!r}")
    expect(values, use_rotary_emb="sequence")
    mixer, backbone = _BLOCKS[kind]
    shared: dict[str, Any] = {
        "vocab_size": integer(values, "vocab_size", 32_000),
        "hidden_size": integer(values, "hidden_size", 4096),
        "num_layers": integer(values, "num_hidden_layers", 32),
        "num_heads": integer(values, "num_attention_heads", 32),
        "intermediate_size": integer(values, "intermediate_size", 11_008),
        "mixers": (mixer,),
        "backbone": backbone,
        "conv_before_block": flag(values, "pre_conv", False),
        "conv_kernel": integer(values, "conv_width", 4),
        "tie_embeddings": flag(values, "tie_word_embeddings", False),
        "rope_theta": number(values, "rope_theta", 10_000.0),
        "norm_eps": number(values, "rms_norm_eps", 1e-6),
        "initializer_range": number(values, "initializer_range", 0.02),
    }
    if mixer == "attention":
        return ModelConfig(**shared, attention=AttentionConfig(max_length=integer(values, "max_sequence_length", 2048)))
    rate = number(values, "ttt_base_lr", 1.0)
    return ModelConfig(
        **shared, ttt=TTTConfig(mini_batch_size=integer(values, "mini_batch_size", 16), inner_learning_rate=rate)
    )


def _values(config: ModelConfig) -> dict[str, Any]:
    """What model_config.json says of our configuration."""
    mixer = config.mixer(config.mixers[0])
    if not config.intermediate_size or config.feed_forward_bias:
        raise InputError("a checkpoint of the official JAX trainer has feed-forward blocks without biases")
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "pre_conv": config.conv_before(mixer),
        "conv_width": config.conv_kernel,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
    }
    if mixer.name == "attention":
        attention = config.attention
        heads, head_dim = attention.num_kv_heads, attention.head_dim
        if (
            (heads or config.num_heads) != config.num_heads
            or (head_dim or config.hidden_size // config.num_heads) * config.num_heads != config.hidden_size
            or attention.use_bias
            or attention.out_bias
            or attention.qk_norm
            or attention.rope_scaling.factor != 1
        ):
            raise InputError(
                "attention of the official JAX trainer has neither grouped heads, heads that do not fill hidden_size, "
                "biases, norms nor scaled positions"
            )
        return {**values, "seq_modeling_block": "self_attention", "max_sequence_length": attention.max_length}
    ttt = released_mixer(config)
    kinds = {of: kind for kind, of in _BLOCKS.items()}
    if ttt.share_qk != ttt.gate:
        raise InputError("a TTT layer of the official JAX trainer shares queries and keys and has a gate, or neither")
    return {
        **values,
        "seq_modeling_block": kinds[ttt.name, "mamba" if ttt.gate else "transformer"],
        "ttt_base_lr": ttt.inner_learning_rate,
        "mini_batch_size": config.ttt.mini_batch_size,
    }


def _table(config: ModelConfig) -> list[Entry]:
    """All parameters, by the components of their keys joined by dots; a component can hold a slash."""
    block, layer = "model.h.{i}.", "model.h.{i}.seq_modeling_block."
    entries = [
        Entry("model.wte.embedding", "embed.embedding"),
        Entry("model.ln_f.kernel", "norm.scale"),
        Entry(f"{block}seq_norm.kernel", "mixer_norm.scale"),
        Entry(f"{block}ffn_norm.kernel", "feed_forward_norm.scale"),
        Entry(f"{block}feed_forward.w1.kernel", "feed_forward.gate_proj.kernel"),
        Entry(f"{block}feed_forward.w2.kernel", "feed_forward.down_proj.kernel"),
        Entry(f"{block}feed_forward.w3.kernel", "feed_forward.up_proj.kernel"),
        Entry(f"{layer}wv.kernel", "mixer.v_proj.kernel"),
        Entry(f"{layer}wo.kernel", "mixer.o_proj.kernel"),
    ]
    if not config.tie_embeddings:
        entries.append(transposed("lm_head.kernel", "lm_head.embedding"))
    mixer = config.mixer(config.mixers[0])
    if config.conv_before(mixer):
        entries.append(Entry(f"{block}conv.conv_norm.kernel", "conv_norm.scale"))
        entries += _conv(f"{block}conv.conv1", "conv")
    if mixer.name == "attention":
        load, save = _pairs_to_halves(config.num_heads), _halves_to_pairs(config.num_heads)
        return [*entries, *(Entry(f"{layer}w{x}.kernel", f"mixer.{x}_proj.kernel", load, save) for x in "qk")]
    ttt = released_mixer(config)
    entries += [
        Entry(f"{layer}wq.kernel", "mixer.q_proj.kernel"),
        Entry(f"{layer}learnable_token_idx", "mixer.token_scale"),
        Entry(
            f"{layer}learnable_ttt_lr/kernel",
            "mixer.learning_rate.kernel",
            lambda a: a[..., 0].T,
            lambda a: a.T[..., None],
        ),
        Entry(f"{layer}learnable_ttt_lr/bias", "mixer.learning_rate.bias", lambda a: a[:, 0], lambda a: a[:, None]),
        Entry(f"{layer}ttt_norm/scale", "mixer.inner_norm.scale"),
        Entry(f"{layer}ttt_norm/bias", "mixer.inner_norm.bias"),
        Entry(f"{layer}post_norm.scale", "mixer.post_norm.scale"),
        Entry(f"{layer}post_norm.bias", "mixer.post_norm.bias"),
    ]
    for i in range(len(ttt.inner_sizes) - 1):
        entries.append(Entry(f"{layer}ttt_dense_{i}", f"mixer.inner.{i}.kernel"))
        entries.append(Entry(f"{layer}ttt_bias_{i}", f"mixer.inner.{i}.bias", lambda a: a[:, 0], lambda a: a[:, None]))
    if ttt.share_qk:
        entries += [*_conv(f"{layer}conv_q", "mixer.conv_q"), *_conv(f"{layer}conv_k", "mixer.conv_k")]
    else:
        entries.append(Entry(f"{layer}wk.kernel", "mixer.k_proj.kernel"))
    if ttt.gate:
        entries.append(Entry(f"{layer}wg.kernel", "mixer.g_proj.kernel"))
    return entries


def _conv(name: str, path: str) -> list[Entry]:
    kernel = Entry(f"{name}.kernel", f"{path}.kernel", lambda a: a[:, 0], lambda a: a[:, None])
    return [kernel, Entry(f"{name}.bias", f"{path}.bias")]


def _pairs_to_halves(num_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Columns of a projection whose heads are turned in pairs `(2i, 2i+1)`, in the order of pairs `(i, i + K/2)`."""
    return lambda a: a.reshape(a.shape[0], num_heads, -1, 2).swapaxes(2, 3).reshape(a.shape)


def _halves_to_pairs(num_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: a.reshape(a.shape[0], num_heads, 2, -1).swapaxes(2, 3).reshape(a.shape)


OFFICIAL_JAX = Architecture(
    "official_jax",
    _config,
    _values,
    _table,
    lambda config: only(config, "ttt_linear", "ttt_mlp", "attention"),
    "official_jax",
)


def streams(folder: Path) -> list[Path]:
    """The streams in a folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file())


def read_parameters(folder: Path) -> Tensors:
    """The parameters in the stream of a folder, by the components of their keys joined by dots.

    Raises:
        InputError: the folder holds no stream or several, or one that is damaged.
    """
    found = streams(folder)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"{folder}: one stream is needed beside {CONFIG}, streaming_params or streaming_train_state, but there "
            f"{'are' if found else 'is'} {names}"
        )
    state = "train_state" in found[0].name
    arrays = {}
    for key, tensor in read_stream(found[0]).items():
        if state and key[:2] != ("params", "params"):
            continue  # the step, and the state of the optimiser
        arrays[".".join(key[2:] if state else key)] = tensor
    if not arrays:
        raise InputError(f"{found[0]}: it holds no parameters (keys `params params ...`)")
    return Tensors(folder, arrays, CONFIG)


def write_parameters(folder: Path, tensors: list[Written], *, train_state: bool = False) -> None:
    """Writes `streaming_params`, or `streaming_train_state` at step 0 with a new optimiser state."""
    keys = {tensor.name: tuple(tensor.name.split(".")) for tensor in tensors}
    if not train_state:
        write_stream(folder / "streaming_params", (Record(keys[tensor.name], tensor) for tensor in tensors))
        return

    def records() -> Iterator[Record]:
        count = Written("", (), np.dtype(np.int32), lambda: np.zeros((), np.int32))
        yield Record(("step",), count)
        for tensor in tensors:
            yield Record(("params", "params", *keys[tensor.name]), tensor)
        yield Record(("opt_state", "1", "0", "count"), count)
        for moment in ("mu", "nu"):  # of optax.scale_by_adam, within clipping and decay
            for tensor in tensors:
                zeros = tensor._replace(value=partial(np.zeros, tensor.shape, tensor.dtype))
                yield Record(("opt_state", "1", "0", moment, "params", *keys[tensor.name]), zeros)
        yield Record(("opt_state", "1", "2", "count"), count)

    write_stream(folder / "streaming_train_state", records())
