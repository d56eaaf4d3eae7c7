"""Saved readings: safetensors files that are checked against model, tokenizer and their own content."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.array_files import UNREADABLE, UNWRITABLE, content_digest, store_arrays, stored_arrays
from tttlm.errors import InputError
from tttlm.inference.reading import Reading, begin
from tttlm.model import LanguageModel

FORMAT = "2"


def save_reading(path: str | Path, reading: Reading, model: LanguageModel, tokenizer: str = "") -> None:
    """Writes a reading to a safetensors file.

    Args:
        path: The file; an existing one is replaced.
        reading: The reading.
        model: The model that read it.
        tokenizer: The fingerprint of the tokenizer of the tokens; "" if there is none.

    Raises:
        InputError: The file cannot be written.
    """
    arrays = {name: _stored(leaf) for name, leaf in _named(_tree(reading))}
    tokens_read = json.dumps(reading.num_tokens.tolist())
    metadata = {
        "format": FORMAT,
        "model": fingerprint(model),
        "tokenizer": tokenizer,
        "content": content_digest(arrays, tokens_read),
        "tokens_read": tokens_read,
    }
    path = Path(path)
    try:
        store_arrays(path, arrays, metadata)
    except UNWRITABLE as error:
        raise InputError(f"{path}: the state cannot be written: {error}: choose another path") from None


def load_reading(path: str | Path, model: LanguageModel, tokenizer: str = "") -> Reading:
    """Loads a reading of `save_reading` for the same model, whose attention caches may be longer than then.

    Arguments are as for `save_reading`.

    Raises:
        InputError: The file cannot be read, is damaged, or is of another model or tokenizer.
    """
    path = Path(path)
    try:
        arrays, metadata = stored_arrays(path)
    except UNREADABLE as error:
        raise InputError(f"{path}: the state cannot be read ({error}): name a file of --save_state") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a saved state of this version of tttlm: name a file of --save_state")
    if metadata.get("model") != fingerprint(model):
        raise InputError(f"{path} is the state of another model: read the text again with this one")
    if metadata.get("tokenizer") != tokenizer:
        raise InputError(f"{path} was read with another tokenizer: use that one, or read the text again")
    if metadata.get("content") != content_digest(arrays, metadata.get("tokens_read", "")):
        raise InputError(f"{path} is damaged: its content is not what was written; read the text again")
    num_tokens = np.asarray(json.loads(metadata["tokens_read"]), np.int64)
    like = _tree(jax.eval_shape(lambda: _tree(begin(model, len(num_tokens)))))
    wanted = _named(like)
    if {name for name, _ in wanted} != arrays.keys():
        raise InputError(f"{path} is the state of another model: read the text again with this one")
    leaves = [_fitted(path, name, arrays[name], leaf) for name, leaf in wanted]
    state, logits, seen = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Reading(state, logits, seen, num_tokens)


def fingerprint(model: LanguageModel) -> str:
    """A digest of a model: its configuration, except the length of attention caches, and its parameters."""
    config = model.config if model.config.cache_length is None else model.config.with_cache_length(1)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True, default=str).encode())
    for name, leaf in _named(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()


def _tree(reading: Any) -> Any:
    return (reading.state, reading.logits, reading.seen) if isinstance(reading, Reading) else reading


def _named(tree: Any) -> list[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def _stored(leaf: Any) -> np.ndarray:
    """The array in a dtype that every version of safetensors supports: bfloat16 as its bits."""
    array = np.ascontiguousarray(np.asarray(leaf))
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _fitted(path: Path, name: str, array: np.ndarray, like: Any) -> jax.Array:
    """The array in the dtype and the shape of `like`, whose cache may be longer."""
    if like.dtype == jnp.bfloat16 and array.dtype == np.uint16:
        array = array.view(jnp.bfloat16)
    more = [(0, there - here) for here, there in zip(array.shape, like.shape, strict=False)]
    if array.dtype != like.dtype or array.ndim != like.ndim or any(rest < 0 for _, rest in more):
        raise InputError(
            f"{path}: {name} is {array.dtype} {array.shape}, and this model has {like.dtype} {like.shape}: give its "
            "attention as much room as it was read with (max_length)"
        )
    return jnp.asarray(np.pad(array, more))
