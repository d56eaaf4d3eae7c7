"""Warm start: a model with other sequence layers that is initialised from a pretrained Transformer.

A TTT or hybrid model gets the embeddings, norms, projections and feed-forward weights of a Llama-like folder of the
same hidden size. There are two layouts of its blocks. If both models have equally many, block `i` is initialised from
block `i`, and other layers replace attention. If the model has one attention block for each of the Transformer's, these
are the Transformer's blocks, and the others are inserted between them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop.checkpoint import Checkpoint, Place
from tttlm.interop.origin import origin_of
from tttlm.mixers.ttt import TTTMixer
from tttlm.model import LanguageModel, ModelConfig

_READOUTS = ("o_proj", "out_proj", "down_proj")  # the last projections of mixers and feed-forward layers
_MATTERS = ("num_kv_heads", "head_dim", "qk_norm", "use_bias", "out_bias", "rope_scaling")


@dataclass(frozen=True)
class WarmStart:
    """A model that is initialised from pretrained weights, with the source of each of its parameters.

    Parameters of stacked blocks are named once for each block, as `block 3: mixer/q_proj/kernel`.

    Attributes:
        model: The model.
        taken: Names of pretrained parameters, each with the name of its tensor.
        fresh: Names of parameters that are initialised as in a new model.
        zeroed: Names of parameters that are zero, so that their blocks add nothing initially.
        left: Names of the folder's tensors that are not used.
    """

    model: LanguageModel
    taken: dict[str, str]
    fresh: tuple[str, ...]
    zeroed: tuple[str, ...]
    left: tuple[str, ...]

    def report(self) -> str:
        """A line for every parameter: its source tensor, "fresh" or "zero"; then the unused tensors."""
        lines = [f"{name}  <-  {source}" for name, source in self.taken.items()]
        lines += [f"{name}  zero" for name in self.zeroed]
        lines += [f"{name}  fresh" for name in self.fresh]
        return "\n".join([*lines, *(f"not taken: {name}" for name in self.left)])


def pretrained_config(folder: str | Path, **changes: Any) -> ModelConfig:
    """The configuration of the model in a released folder, with some fields changed.

    >>> config = pretrained_config("llama", mixers=("attention", "ttt_linear"), num_layers=32)

    Raises:
        InputError: the folder cannot be read, or the combination of fields is invalid.
    """
    return replace(Checkpoint(Path(folder)).config, **changes)


def warm_start(
    folder: str | Path, config: ModelConfig, *, zero_readout: bool = False, rngs: nnx.Rngs | None = None
) -> WarmStart:
    """A model whose embeddings, norms, projections and feed-forward weights are those of a pretrained Transformer.

    Keys and values of grouped-query attention are repeated for every head of a layer without groups, and queries and
    keys of TTT layers are permuted, because their rotary embedding rotates interleaved pairs and that of Llama rotates
    halves. An inserted block is initialised as far as possible from the Transformer's block before it.

    Args:
        folder: a released folder of attention and feed-forward blocks: Llama, SmolLM, Qwen, official Transformers.
        config: the model, for instance from `pretrained_config`. Its attention blocks must be computed as those of the
            folder.
        zero_readout: whether the last projections of inserted blocks, and convolutions before blocks, are initialised
            with zero: the initial logits are those of the pretrained model. This needs all of its attention blocks.
        rngs: random number generators of fresh parameters; None: seed 0.

    Raises:
        InputError: the models do not match, or the folder cannot be read.
    """
    checkpoint = Checkpoint(Path(folder))
    checkpoint.check()
    base = checkpoint.config
    sources = _sources(base, config)
    inserted = config.num_layers != base.num_layers
    _check_fit(base, config)
    if zero_readout and any(m != "attention" for m in config.mixers) and not inserted:
        raise InputError(
            "zero_readout makes the first logits those of the pretrained model only where all of its attention stays: "
            f"model.mixers must hold an attention block for each of its {base.num_layers} blocks, and others between "
            f"them, got {config.num_layers} blocks of {', '.join(config.mixers)}"
        )
    model = LanguageModel(config, rngs=rngs or nnx.Rngs(0))
    parts = {(part.path, part.repeat): part for part in checkpoint.parts}
    taken: dict[str, str] = {}
    fresh, zeroed = [], []

    def transfer(where: Place, repeat: int | None, like: np.ndarray, name: str, mixer: str) -> np.ndarray:
        part = parts.get((where, repeat))
        value = None if part is None else _fitted(checkpoint.read(part), where, like.shape, base, config, mixer)
        if part is None or value is None:
            fresh.append(name)
            return like
        taken[name] = checkpoint.stored_name(part)
        return value.astype(like.dtype)

    state, period = [], len(config.mixers)
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path: Place = key
        values = np.array(variable[...])
        if path[0] != "stack":
            where = ("embed", "embedding") if path[0] == "lm_head" and base.tie_embeddings else path
            values = transfer(where, None, values, "/".join(map(str, path)), "")
            state.append((key, variable.replace(jnp.asarray(values))))
            continue
        for repeat in range(config.repeats):
            block = repeat * period + path[2]
            name = f"block {block}: {'/'.join(map(str, path[3:]))}"
            mixer = config.mixers[path[2]]
            extra = inserted and mixer != "attention"
            if zero_readout and (path[3] == "conv" or (extra and any(part in _READOUTS for part in path[3:]))):
                values[repeat] = 0
                zeroed.append(name)
            else:
                where = ("stack", "blocks", 0, *path[3:])
                values[repeat] = transfer(where, sources[block], values[repeat], name, mixer)
        state.append((key, variable.replace(jnp.asarray(values))))
    nnx.update(model, nnx.from_flat_state(state))
    if zero_readout:
        _check_readouts(config, zeroed, inserted)
    model.origin = origin_of(checkpoint)
    names = {checkpoint.stored_name(part) for part in checkpoint.parts}
    return WarmStart(model, taken, tuple(fresh), tuple(zeroed), tuple(sorted(names - set(taken.values()))))


def _sources(base: ModelConfig, config: ModelConfig) -> list[int]:
    """For every block, the index of the pretrained block that it is initialised from."""
    if set(base.mixers) != {"attention"} or not base.intermediate_size:
        raise InputError(f"a warm start begins with attention and feed-forward blocks, got {', '.join(base.mixers)}")
    if config.num_layers == base.num_layers:
        return list(range(base.num_layers))
    attention = [config.mixers[block % len(config.mixers)] == "attention" for block in range(config.num_layers)]
    if sum(attention) != base.num_layers:
        raise InputError(
            f"model.num_layers must be the {base.num_layers} of the pretrained model, or model.mixers hold so many "
            f"attention blocks; got {config.num_layers} blocks, {sum(attention)} of them attention"
        )
    before = np.cumsum(attention) - 1
    return [int(max(0, index)) for index in before]


def _check_fit(base: ModelConfig, config: ModelConfig) -> None:
    """Refuses a model that would compute different outputs from the pretrained weights."""
    pairs = {name: (getattr(base, name), getattr(config, name)) for name in ("hidden_size", "vocab_size", "norm_eps")}
    pairs["intermediate_size"] = (base.intermediate_size, config.intermediate_size)
    if config.tie_embeddings and not base.tie_embeddings:
        pairs["tie_embeddings"] = (False, True)
    if "attention" in config.mixers:
        pairs |= {name: (getattr(base, name), getattr(config, name)) for name in ("num_heads", "rope_theta")}
        ours, theirs = config.mixer("attention").settings, base.attention
        pairs |= {f"attention.{name}": (getattr(theirs, name), getattr(ours, name)) for name in _MATTERS}
    for name, (there, here) in pairs.items():
        if there != here:
            raise InputError(f"model.{name} must be that of the pretrained model, {there}, got {here}")


def _fitted(
    value: np.ndarray, where: Place, shape: tuple[int, ...], base: ModelConfig, config: ModelConfig, mixer: str
) -> np.ndarray | None:
    """A pretrained value as a parameter of that shape in another layer, or None if it cannot be used."""
    if "mixer" not in where or mixer == "attention":
        return value if value.shape == shape else None
    name, heads = where[where.index("mixer") + 1], base.num_heads
    groups = base.attention.num_kv_heads or heads
    if where[-1] != "kernel":
        return None  # other layers do not have the biases and norms of attention
    if name in ("k_proj", "v_proj") and groups != heads:
        split = value.reshape(value.shape[0], groups, -1)
        value = np.repeat(split, heads // groups, axis=1).reshape(value.shape[0], -1)
    if value.shape != shape:
        return None
    if name in ("q_proj", "k_proj") and isinstance(config.mixer(mixer), TTTMixer):
        if config.num_heads != heads:
            return None
        value = value.reshape(value.shape[0], heads, 2, -1).swapaxes(2, 3).reshape(value.shape)
    return value


def _check_readouts(config: ModelConfig, zeroed: list[str], inserted: bool) -> None:
    """Refuses a mixer without a known last projection."""
    for position, mixer in enumerate(config.mixers):
        if inserted and mixer != "attention":
            begin = f"block {position}: mixer/"
            if not any(name.startswith(begin) and name.endswith("kernel") for name in zeroed):
                raise InputError(
                    f"zero_readout knows no last projection of the mixer {mixer!r} ({', '.join(_READOUTS)})"
                )
