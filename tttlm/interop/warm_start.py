"""Warm start: a model with other sequence layers that is initialised from a pretrained Transformer.

A TTT or hybrid model gets the embeddings, norms, projections and feed-forward weights of a Llama-like folder of the
same hidden size. There are two layouts of its blocks. If both models have equally many, block `i` is initialised from
block `i`, and other layers replace attention. If the model has one attention block for each of the Transformer's, these
are the Transformer's blocks, and the others are inserted between them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop.checkpoint import Checkpoint, Place, abstract_parameters, model_parameters
from tttlm.interop.origin import origin_of
from tttlm.mixers.ttt import TTTMixer
from tttlm.model import LanguageModel, ModelConfig

_READOUTS = ("o_proj", "out_proj", "down_proj")  # the last projections of mixers and feed-forward layers
_SMALL = 2**20  # parameters up to this size are initialised together, which compiles one program
_MATTERS = ("num_kv_heads", "head_dim", "qk_norm", "use_bias", "out_bias", "rope_scaling")


@dataclass(frozen=True)
class Sources:
    """The source of each parameter of a model that is initialised from pretrained weights.

    Parameters of stacked blocks are named once for each block, as `block 3: mixer/q_proj/kernel`.

    Attributes:
        pretrained: Names of pretrained parameters, each with the name of its tensor.
        new: Names of parameters that are initialised as in a new model.
        zeroed: Names of parameters that are zero, so that their blocks add nothing initially.
        unused: Names of the folder's tensors that are not used.
    """

    pretrained: dict[str, str]
    new: tuple[str, ...]
    zeroed: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> str:
        """A line for every parameter: its source tensor, "new" or "zero"; then the unused tensors."""
        lines = [f"{name}  <-  {source}" for name, source in self.pretrained.items()]
        lines += [f"{name}  zero" for name in self.zeroed]
        lines += [f"{name}  new" for name in self.new]
        return "\n".join([*lines, *(f"unused: {name}" for name in self.unused)])


@dataclass(frozen=True)
class WarmStart(Sources):
    """A model that is initialised from pretrained weights, with the source of each of its parameters.

    Attributes:
        model: The model.
    """

    model: LanguageModel


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
        rngs: random number generators of new parameters; None: seed 0.

    Raises:
        InputError: the models do not match, or the folder cannot be read.
    """
    model = LanguageModel(config, rngs=rngs or nnx.Rngs(0))
    initial = model_parameters(model)
    parameters = WarmParameters(
        folder, config, zero_readout=zero_readout, initial=lambda path: np.asarray(initial[path])
    )
    state = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] == "stack":
            values = np.stack([parameters.read(path, repeat) for repeat in range(config.repeats)])
        else:
            values = parameters.read(path, None)
        state.append((path, variable.replace(jnp.asarray(values))))
    nnx.update(model, nnx.from_flat_state(state))
    model.origin = parameters.origin
    return WarmStart(**vars(parameters.sources()), model=model)


class WarmParameters:
    """The parameters of a model that is initialised from a pretrained Transformer, each read when it is asked for.

    Args:
        folder: as in `warm_start`.
        config: the model.
        zero_readout: as in `warm_start`.
        initial: gives the initial values of a parameter in a new model; None: from seed 0, one parameter at a time.

    Raises:
        InputError: the models do not match, or the folder cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        *,
        zero_readout: bool = False,
        initial: Callable[[Place], np.ndarray] | None = None,
    ) -> None:
        self._checkpoint = Checkpoint(Path(folder))
        self._checkpoint.check()
        self.config, self.origin = config, origin_of(self._checkpoint)
        self._base = base = self._checkpoint.config
        self._blocks = _sources(base, config)
        _check_fit(base, config)
        inserted = config.num_layers != base.num_layers
        if zero_readout and any(m != "attention" for m in config.mixers) and not inserted:
            raise InputError(
                "zero_readout makes the first logits those of the pretrained model only where all of its attention "
                f"stays: model.mixers must hold an attention block for each of its {base.num_layers} blocks, and "
                f"others between them, got {config.num_layers} blocks of {', '.join(config.mixers)}"
            )
        self._shapes = {path: (p.shape, jnp.dtype(p.dtype)) for path, p in abstract_parameters(config)[1].items()}
        self._parts = {(part.path, part.repeat): part for part in self._checkpoint.parts}
        self._initial = initial or initial_values(config)
        self._zero = {path for path in self._shapes if zero_readout and _is_readout(path, config, inserted)}
        if zero_readout and inserted:
            _check_readouts(config, self._zero)
        self._pretrained: dict[str, str] = {}
        self._new: list[str] = []
        self._zeroed: list[str] = []

    def read(self, path: Place, repeat: int | None) -> np.ndarray:
        """The values of a parameter, or of one repeat of a stacked one."""
        shape, dtype = self._shapes[path]
        if repeat is None:
            name, mixer = "/".join(map(str, path)), ""
            part = self._parts.get((("embed", "embedding") if self._shares_embedding(path) else path, None))
        else:
            block, shape = repeat * len(self.config.mixers) + path[2], shape[1:]
            name, mixer = f"block {block}: {'/'.join(map(str, path[3:]))}", self.config.mixers[path[2]]
            part = self._parts.get((("stack", "blocks", 0, *path[3:]), self._blocks[block]))
        if path in self._zero:
            self._zeroed.append(name)
            return np.zeros(shape, dtype)
        value = None
        if part is not None:
            value = _fitted(self._checkpoint.read(part), part.path, shape, self._base, self.config, mixer)
        if part is None or value is None:
            self._new.append(name)
            values = self._initial(path)
            return values if repeat is None else values[repeat]
        self._pretrained[name] = self._checkpoint.stored_name(part)
        return value.astype(dtype)

    def _shares_embedding(self, path: Place) -> bool:
        return path[0] == "lm_head" and self._base.tie_embeddings

    def sources(self) -> Sources:
        """The sources of the parameters that were read."""
        names = {self._checkpoint.stored_name(part) for part in self._checkpoint.parts}
        unused = tuple(sorted(names - set(self._pretrained.values())))
        return Sources(self._pretrained, tuple(self._new), tuple(self._zeroed), unused)


def initial_values(config: ModelConfig, seed: int = 0) -> Callable[[Place], np.ndarray]:
    """A function that gives the initial values of a parameter of a new model; one large one is in memory at a time."""

    def initial(chosen: Callable[[Place, jax.Array], bool]) -> dict[Place, jax.Array]:
        """Compiles a program from which all that the chosen parameters do not depend on is left out."""

        def parameters() -> dict[Place, jax.Array]:
            found = model_parameters(LanguageModel(config, rngs=nnx.Rngs(seed)))
            return {path: value for path, value in found.items() if chosen(path, value)}

        return jax.jit(parameters)()

    small: dict[Place, jax.Array] = {}

    @lru_cache(maxsize=1)  # its repeats are read one after another
    def values(path: Place) -> np.ndarray:
        if not small:
            small.update(initial(lambda _, value: value.size <= _SMALL))
        return np.asarray(small[path] if path in small else initial(lambda other, _: other == path)[path])

    return values


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
        ours, theirs = config.mixer("attention").config, base.attention
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


def _is_readout(path: Place, config: ModelConfig, inserted: bool) -> bool:
    """Whether a parameter is that of a last projection of an inserted block, or of a convolution before a block."""
    if path[0] != "stack":
        return False
    extra = inserted and config.mixers[path[2]] != "attention"
    return path[3] == "conv" or (extra and any(part in _READOUTS for part in path[3:]))


def _check_readouts(config: ModelConfig, zero: set[Place]) -> None:
    """Refuses an inserted mixer without a known last projection."""
    for position, mixer in enumerate(config.mixers):
        found = any(path[2:4] == (position, "mixer") and path[-1] == "kernel" for path in zero)
        if mixer != "attention" and not found:
            raise InputError(f"zero_readout knows no last projection of the mixer {mixer!r} ({', '.join(_READOUTS)})")
