"""The state of an adapter in a file: safetensors, one array for each leaf, named by its path."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tttlm.errors import InputError


def write_state(path: Path, state: Any) -> None:
    """Writes every array of a pytree.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        save_file({name: np.asarray(leaf, order="C") for name, leaf in _named(state)}, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the state cannot be written: {error}") from None


def read_state(path: Path, like: Any) -> Any:
    """Reads the pytree that `write_state` wrote, in the structure of `like`.

    Raises:
        InputError: the file cannot be read, or its arrays are not those of `like` in name, shape and dtype.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the state cannot be read: {error}") from None
    named = _named(like)
    facts = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in named}
    stored = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if facts != stored:
        name = next(name for name in sorted({*facts, *stored}) if facts.get(name) != stored.get(name))
        raise InputError(f"{path}: {name} is {stored.get(name, 'missing')}, this adapter has {facts.get(name, 'none')}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name, _ in named])


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
