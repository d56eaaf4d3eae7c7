"""`from_pretrained` and `save_pretrained`: models from and to folders in a released layout."""

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
        folder: a folder in the layout of Hugging Face's `save_pretrained`, of Mamba's authors, or of the official JAX
            trainer; if there is no such folder, `owner/name` is a repository of the hub, which is fetched into its
            cache.
        dtype: dtype of the computation; None: as `param_dtype`.
        param_dtype: dtype of the parameters, whatever the file has.
        revision: a branch, tag or commit of the repository; None: its main branch.
        cache_dir: the hub's cache; None: that of `HF_HOME` or `HF_HUB_CACHE`.
        token: for private and gated repositories; None: the one that was saved by logging in, or `HF_TOKEN`.
        local_files_only: use what is in the cache and no network, as `HF_HUB_OFFLINE=1` does for a whole process.

    Raises:
        InputError: the architecture is unknown, or a tensor is missing, unexpected, damaged or has another shape;
            nothing is loaded then.
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
    """Writes a folder that `from_pretrained`, and the original code of the layout, can read.

    Token ids, positions and other fields of the configuration file that the model was read from, and the files of its
    tokenizer, are written too.

    Args:
        model: a model with one kind of mixer; a hybrid has no released layout.
        folder: the output folder; created if it does not exist, and must not have a checkpoint yet.
        layout: `huggingface`; for both Mambas that of their authors' code, `mamba_ssm`; for TTT models and
            Transformers that of the official JAX trainer, `official_jax`. None: the layout that the model was read
            from, or Hugging Face's.
        shard_bytes: largest size in bytes of one file; a larger model is split into `model-*.safetensors` with an
            index.
        train_state: in the layout `official_jax`, write `streaming_train_state` at step 0 instead of
            `streaming_params`.

    Raises:
        InputError: no released layout has such a model, or the folder already has a checkpoint.
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
    """A function from the path of a parameter to its values, or to one repeat of a stacked one."""
    parameters = model_parameters(model)

    def read(path: Place, repeat: int | None) -> np.ndarray:
        value = parameters[path]
        return np.asarray(value if repeat is None else value[repeat])

    return read
