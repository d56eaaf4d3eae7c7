"""`from_pretrained` and `save_pretrained`: a folder in the Hugging Face layout is our model, and back."""

import fnmatch
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop import llama, mamba, mamba2, ttt
from tttlm.interop.architecture import Entry
from tttlm.interop.tensors import INDEX, SINGLE, Tensors, read_json, write_tensors
from tttlm.model import LanguageModel, ModelConfig

ARCHITECTURES: dict[str, ModuleType] = {module.model_type: module for module in (llama, mamba, mamba2, ttt)}
# Constants that some versions of the reference code store beside the parameters, and what they are.
CONSTANTS: dict[str, Callable[[ModelConfig, int], np.ndarray]] = {
    "*.inv_freq": lambda config, size: config.rope_theta ** (-np.arange(size) / size),
    "*.token_idx": lambda config, size: 1 / np.arange(1, size + 1),
}

Place = tuple[Any, ...]


def from_pretrained(folder: str | Path, *, dtype: str | None = None, param_dtype: str = "float32") -> LanguageModel:
    """The language model in a folder of `config.json` and `model.safetensors`, or `model-*.safetensors` with index.

    Args:
        folder: as Hugging Face's `save_pretrained` writes it.
        dtype: what the model computes in; None: as `param_dtype`.
        param_dtype: what the parameters are kept in, whatever the file has.

    Raises:
        InputError: in one line, for an unknown architecture, and for a tensor that is missing, of another shape, in a
            damaged file, or of no use; then nothing was loaded.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    architecture = ARCHITECTURES.get(str(values.get("model_type")))
    if architecture is None:
        raise InputError(
            f"{folder / 'config.json'}: unknown model_type {values.get('model_type')!r}; "
            f"there are {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        config = architecture.config(values)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    config = replace(config, dtype=dtype or param_dtype, param_dtype=param_dtype)
    entries = architecture.table(config)
    tensors = Tensors(folder)
    if config.num_layers > len(tensors):
        raise InputError(
            f"{folder}: config.json says num_hidden_layers = {config.num_layers}, but the folder holds "
            f"{len(tensors)} tensors in all; check config.json against the file"
        )
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    parameters = nnx.to_flat_state(state)
    shapes = {path: variable.shape for path, variable in parameters}
    loaded: dict[Place, jax.Array] = {}
    for entry in entries:
        for path, names in _places(entry, config):
            parts = [
                entry.load(tensors.read(n, _shape_there(entry, shapes[path], stacked="{i}" in entry.name)))
                for n in names
            ]
            value = np.stack(parts) if "{i}" in entry.name else parts[0]
            loaded[path] = jnp.asarray(value, param_dtype)
    _check_unread(tensors, config, loaded)
    if missing := shapes.keys() - loaded.keys():
        raise AssertionError(f"the table of {architecture.__name__} has no entry for {sorted(map(str, missing))}")
    return nnx.merge(graph, nnx.from_flat_state([(path, v.replace(loaded[path])) for path, v in parameters]))


def save_pretrained(model: LanguageModel, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that `from_pretrained`, and the code the checkpoints come from, can read.

    Args:
        model: of one kind of mixer; a hybrid has no released layout.
        folder: made when missing; it must not hold a checkpoint yet.
        shard_bytes: how large one file may be; a larger model is cut into `model-*.safetensors` with an index.

    Raises:
        InputError: when no released layout has such a model, or the folder holds one already.
    """
    folder, config = Path(folder), model.config
    architecture = _architecture_of(config)
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        raise InputError(f"{folder} holds a checkpoint already; choose another folder or remove it first")
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    def tensors() -> Iterator[tuple[str, Callable[[], np.ndarray], int]]:
        for entry in architecture.table(config):
            for path, names in _places(entry, config):
                array = parameters[path][...]
                for i, name in enumerate(names):

                    def value(array=array, i=i, entry=entry) -> np.ndarray:
                        part = array[i] if "{i}" in entry.name else array
                        return np.ascontiguousarray(entry.save(np.asarray(part)))

                    yield name, value, array.nbytes // len(names)

    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": architecture.model_type, **architecture.values(config)}
    values["torch_dtype"] = config.param_dtype
    write_tensors(folder, sorted(tensors(), key=lambda t: t[0]), shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _architecture_of(config: ModelConfig) -> ModuleType:
    if len(set(config.mixers)) == 1:
        for module in ARCHITECTURES.values():
            if config.mixers[0] in module.MIXERS.values():
                return module
    raise InputError(f"no released layout has a model of mixers {list(config.mixers)}; it stays in its run directory")


def _places(entry: Entry, config: ModelConfig) -> Iterator[tuple[Place, list[str]]]:
    """The paths in our model that an entry fills, each with the names it is stacked from."""
    path = tuple(int(part) if part.isdigit() else part for part in entry.path.split("."))
    if "{i}" not in entry.name:
        yield path, [entry.name]
        return
    period = len(config.mixers)
    for p in range(period):
        yield ("stack", "blocks", p, *path), [entry.name.format(i=i) for i in range(p, config.num_layers, period)]


def _shape_there(entry: Entry, shape: tuple[int, ...], *, stacked: bool) -> tuple[int, ...]:
    """The shape a parameter of ours has in the checkpoint."""
    return entry.save(np.broadcast_to(np.float32(0), shape[1:] if stacked else shape)).shape


def _check_unread(tensors: Tensors, config: ModelConfig, loaded: dict[Place, jax.Array]) -> None:
    """Refuses a tensor that was not read, unless it is only a copy of what was read or of a constant."""
    for name in sorted(tensors.unread):
        known = next((of for pattern, of in CONSTANTS.items() if fnmatch.fnmatch(name, pattern)), None)
        if known is not None:
            value = tensors.read_any(name).ravel().astype(np.float64)
            if np.allclose(value, known(config, value.size), rtol=1e-2):  # some are stored in bfloat16
                continue
            raise InputError(
                f"{tensors.folder}: tensor {name!r} holds other values than config.json makes (rope_theta = "
                f"{config.rope_theta}); check config.json against the file"
            )
        if name == "lm_head.weight" and config.tie_embeddings:  # a copy of the embedding, as some writers keep it
            embedding = loaded["embed", "embedding"]
            head = jnp.asarray(tensors.read(name, embedding.shape), embedding.dtype)
            if bool(jnp.array_equal(head, embedding)):
                continue
            raise InputError(
                f"{tensors.folder}: tensor {name!r} is not the embedding, but config.json ties the two "
                "(tie_word_embeddings, also where it is left out); set it to false if the head is one of its own"
            )
        raise InputError(
            f"{tensors.folder}: tensor {name!r} is no part of the model that config.json describes; "
            "check config.json against the file"
        )
