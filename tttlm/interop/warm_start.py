"""Warm start: a model of other sequence layers that begins with the weights of a pretrained Transformer.

A Llama-like folder gives its embeddings, norms, projections and feed-forward weights to a TTT or hybrid model of the
same width. Two ways of laying its blocks out are told apart by their number. Where both models have as many, block `i`
takes from block `i`, and other layers stand in place of attention. Where the model has one attention block for each of
the Transformer's, those are the Transformer's blocks, and the others are inserted between them.
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

_READOUTS = ("o_proj", "out_proj", "down_proj")  # what a mixer or feed-forward layer adds goes through one of these
_MATTERS = ("num_kv_heads", "head_dim", "qk_norm", "use_bias", "out_bias", "rope_scaling")


@dataclass(frozen=True)
class WarmStart:
    """A model that begins with pretrained weights, and where each of its parameters comes from.

    Parameters of stacked blocks are named once for each block, as `block 3: mixer/q_proj/kernel`.

    Attributes:
        model: The model.
        taken: Names of parameters that were taken, each with the name of the tensor it was taken from.
        fresh: Names of parameters that are as a new model has them.
        zeroed: Names of parameters that are zero, so that their blocks add nothing to the stream yet.
        left: Names of the folder's tensors that nothing was taken from.
    """

    model: LanguageModel
    taken: dict[str, str]
    fresh: tuple[str, ...]
    zeroed: tuple[str, ...]
    left: tuple[str, ...]

    def report(self) -> str:
        """A line for every parameter: what it was taken from, or that it is fresh or zero; then what was left."""
        lines = [f"{name}  <-  {source}" for name, source in self.taken.items()]
        lines += [f"{name}  zero" for name in self.zeroed]
        lines += [f"{name}  fresh" for name in self.fresh]
        return "\n".join([*lines, *(f"not taken: {name}" for name in self.left)])


def pretrained_config(folder: str | Path, **changes: Any) -> ModelConfig:
    """The configuration of the model in a released folder, with some fields changed.

    >>> config = pretrained_config("llama", mixers=("attention", "ttt_linear"), num_layers=32)

    Raises:
        InputError: the folder cannot be read, or the fields do not go together.
    """
    return replace(Checkpoint(Path(folder)).config, **changes)


def warm_start(
    folder: str | Path, config: ModelConfig, *, zero_readout: bool = False, rngs: nnx.Rngs | None = None
) -> WarmStart:
    """A model whose embeddings, norms, projections and feed-forward weights are those of a pretrained Transformer.

    Keys and values that several heads share there are repeated for every head of a layer that shares none, and queries
    and keys of TTT layers are permuted, as their rotary embedding turns neighbours where that of Llama turns halves. An
    inserted block takes what it can from the Transformer's block before it.

    Args:
        folder: a released folder of attention and feed-forward blocks: Llama, SmolLM, Qwen, official Transformers.
        config: the model, for instance of `pretrained_config`. Its attention blocks must compute what those in the
            folder do.
        zero_readout: start the last projections of inserted blocks, and convolutions before blocks, at zero: the first
            logits are those of the pretrained model. This needs all of its attention blocks.
        rngs: for what is fresh; None: seed 0.

    Raises:
        InputError: the models do not fit together, or the folder cannot be read.
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
    """For every block the pretrained block that it takes from."""
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
    """Refuses a model that would compute something else with the weights."""
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
    """A pretrained value as a parameter of that shape in another layer, or None where it does not fit."""
    if "mixer" not in where or mixer == "attention":
        return value if value.shape == shape else None
    name, heads = where[where.index("mixer") + 1], base.num_heads
    groups = base.attention.num_kv_heads or heads
    if where[-1] != "kernel":
        return None  # biases and norms of attention have no place in other layers
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
    """Refuses a mixer of which nothing was found to start at zero."""
    for position, mixer in enumerate(config.mixers):
        if inserted and mixer != "attention":
            begin = f"block {position}: mixer/"
            if not any(name.startswith(begin) and name.endswith("kernel") for name in zeroed):
                raise InputError(
                    f"zero_readout knows no last projection of the mixer {mixer!r} ({', '.join(_READOUTS)})"
                )
