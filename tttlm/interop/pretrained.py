"""`from_pretrained` and `save_pretrained`: a folder in a released layout is our model, and back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop.checkpoint import (
    Checkpoint,
    Place,
    abstract_parameters,
    architecture_for,
    model_parameters,
    write_checkpoint,
)
from tttlm.interop.hub import fetch, is_repository
from tttlm.interop.origin import check_there, copy_files, kept_values, origin_of
from tttlm.model import LanguageModel


def from_pretrained(
    folder: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str = "float32",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LanguageModel:
    """The language model in a folder of a released layout, or in a repository of the Hugging Face hub.

    That is `config.json` and `model.safetensors`, or `model-*.safetensors` with their index; or `model_config.json` and
    a stream of the official JAX trainer of TTT models, `streaming_params` or `streaming_train_state`.

    Args:
        folder: as Hugging Face's `save_pretrained` writes it, as Mamba's authors do, or as the official JAX trainer;
            where there is no such folder, `owner/name` is the repository of the hub, which is fetched into its cache.
        dtype: what the model computes in; None: as `param_dtype`.
        param_dtype: what the parameters are kept in, whatever the file has.
        revision: a branch, tag or commit of the repository; None: its main branch.
        cache_dir: the hub's cache; None: where `HF_HOME` or `HF_HUB_CACHE` say.
        token: for private and gated repositories; None: the one that was saved by logging in, or `HF_TOKEN`.
        local_files_only: use what is in the cache and no network, as `HF_HUB_OFFLINE=1` does for a whole process.

    Raises:
        InputError: in one line, for an unknown architecture, and for a tensor that is missing, of another shape, in a
            damaged file, or of no use; then nothing was loaded.
    """
    repository = not Path(folder).exists() and isinstance(folder, str) and is_repository(folder)
    if not repository and (revision is not None or local_files_only):
        raise InputError(f"revision and local_files_only are for repositories of the hub, but {folder} is a folder")
    source = (
        fetch(str(folder), revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        if repository
        else Path(folder)
    )
    checkpoint = Checkpoint(source)
    checkpoint.check()
    precision: dict[str, Any] = {"dtype": dtype or param_dtype, "param_dtype": param_dtype}
    config = replace(checkpoint.config, **precision)
    graph, parameters = abstract_parameters(config)
    pieces: dict[Place, list[np.ndarray]] = {}
    for part in checkpoint.parts:
        pieces.setdefault(part.path, []).append(checkpoint.read(part))
    stacked = {part.path for part in checkpoint.parts if part.repeat is not None}
    state = []
    for path, variable in parameters.items():
        values = pieces.pop(path)
        value = np.stack(values) if path in stacked else values[0]
        state.append((path, variable.replace(jnp.asarray(value, param_dtype))))
    model = nnx.merge(graph, nnx.from_flat_state(state))
    model.origin = origin_of(checkpoint)
    return model


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    layout: str | None = None,
    shard_bytes: int = 5 * 10**9,
    train_state: bool = False,
) -> None:
    """Writes a folder that `from_pretrained`, and the code the checkpoints come from, can read.

    What the model came with goes with it: token ids, positions and the rest of its configuration file, and the files of
    its tokenizer.

    Args:
        model: of one kind of mixer; a hybrid has no released layout.
        folder: made when missing; it must not hold a checkpoint yet.
        layout: `huggingface`; for both Mambas that of their authors' code, `mamba_ssm`; for TTT models and
            Transformers that of the official JAX trainer, `official_jax`. None: the one that the model came in, or
            Hugging Face's.
        shard_bytes: how large one file may be; a larger model is cut into `model-*.safetensors` with an index.
        train_state: in the layout `official_jax`, write `streaming_train_state` at step 0 and not `streaming_params`.

    Raises:
        InputError: when no released layout has such a model, or the folder holds one already.
    """
    config, origin, folder = model.config, model.origin, Path(folder)
    architecture = architecture_for(config, like=origin.architecture if origin else "", layout=layout)
    values = kept_values(origin, architecture, config)
    check_there(origin)
    parameters, read = model_parameters(model), model_reader(model)

    write_checkpoint(
        folder,
        architecture,
        config,
        values,
        lambda part: read(part.path, part.repeat),
        lambda part: np.dtype(parameters[part.path].dtype),
        shard_bytes=shard_bytes,
        train_state=train_state,
    )
    copy_files(origin, folder)


def model_reader(model: LanguageModel) -> Callable[[Place, int | None], np.ndarray]:
    """A function that gives the values of a parameter by its path, or what one repeat of the pattern has of a stack."""
    parameters = model_parameters(model)

    def read(path: Place, repeat: int | None) -> np.ndarray:
        value = parameters[path]
        return np.asarray(value if repeat is None else value[repeat])

    return read
