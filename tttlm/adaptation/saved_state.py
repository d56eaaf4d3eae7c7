"""Arrays in a file, with a digest that is checked: the state of an adapter, and parts of an experiment."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tttlm.array_files import UNREADABLE, UNWRITABLE, content_digest, store_arrays, stored_arrays
from tttlm.errors import InputError


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays to a safetensors file, which appears under its name when it is complete.

    Raises:
        InputError: the file cannot be written.
    """
    stored = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        store_arrays(path, stored, {"content": content_digest(stored)})
    except UNWRITABLE as error:
        raise InputError(f"{path}: the arrays cannot be written: {error}") from None


def read_arrays(path: Path, *, advice: str) -> dict[str, np.ndarray]:
    """Reads the arrays that `write_arrays` wrote.

    Raises:
        InputError: the file cannot be read, or was altered; ends with the advice.
    """
    try:
        arrays, metadata = stored_arrays(path)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}") from None
    if metadata.get("content") != content_digest(arrays):
        raise InputError(f"{path}: was altered, or written by another version (no such digest); {advice}")
    return arrays


def write_state(path: Path, state: Any) -> None:
    """Writes every array of a pytree, one for each leaf, named by its path.

    Raises:
        InputError: the file cannot be written.
    """
    write_arrays(path, dict(_named(state)))


def read_state(path: Path, like: Any) -> Any:
    """Reads the pytree that `write_state` wrote, in the structure of `like`.

    Raises:
        InputError: the file cannot be read, was altered, or its arrays are not those of `like` in name, shape and
            dtype.
    """
    arrays = read_arrays(path, advice="name a file that this version saved")
    named = _named(like)
    facts = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in named}
    stored = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if facts != stored:
        name = next(name for name in sorted({*facts, *stored}) if facts.get(name) != stored.get(name))
        raise InputError(f"{path}: {name} is {stored.get(name, 'missing')}, this adapter has {facts.get(name, 'none')}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name, _ in named])


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
