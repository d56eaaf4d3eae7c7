"""Conversion between layouts, tensor by tensor; and logits of a model that is read block by block."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from tttlm.interop.checkpoint import Checkpoint, Part, Place, architecture_for, write_checkpoint
from tttlm.interop.origin import Origin, check_there, copy_files, kept_values, origin_of
from tttlm.model import ModelConfig
from tttlm.model.language_model import Pattern

_ROWS = 4096  # rows of the head in memory in float32 at a time


class Parameters(Protocol):
    """A model whose parameters are read one at a time.

    Attributes:
        config: Its configuration; `param_dtype` is the dtype in which most of its parameters are stored.
    """

    config: ModelConfig

    def read(self, path: Place, repeat: int | None) -> np.ndarray:
        """The values of a parameter in our layout, or one repeat of a stacked one."""

    def dtype(self, path: Place, repeat: int | None) -> np.dtype:
        """The dtype of these values."""

    def name(self, path: Place, repeat: int | None) -> str:
        """The name of these values in the source."""


class FolderParameters:
    """The parameters in a released folder, after checking that it has all of them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.checkpoint.check()
        self.origin = origin_of(self.checkpoint)
        self._parts = {(part.path, part.repeat): part for part in self.checkpoint.parts}
        dtypes = [self.dtype(*where).name for where in self._parts]
        most: Any = max(("float32", "bfloat16", "float64"), key=dtypes.count)
        self.config = replace(self.checkpoint.config, dtype=most, param_dtype=most)

    def read(self, path: Place, repeat: int | None) -> np.ndarray:
        return self.checkpoint.read(self._parts[path, repeat])

    def dtype(self, path: Place, repeat: int | None) -> np.dtype:
        return jnp.dtype(self.checkpoint.tensors[self.name(path, repeat)].dtype)

    def name(self, path: Place, repeat: int | None) -> str:
        return self.checkpoint.stored_name(self._parts[path, repeat])


@dataclass(frozen=True)
class Converted:
    """A tensor that was written.

    Attributes:
        name: Its name.
        source: The name of its source.
        shape: Its shape.
        dtype: The name of its dtype.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str


def convert(
    source: Parameters,
    folder: Path,
    layout: str,
    *,
    origin: Origin | None = None,
    shard_bytes: int = 5 * 10**9,
    train_state: bool = False,
) -> list[Converted]:
    """Writes a model in another layout; at most two copies of one tensor are in memory.

    Args:
        source: the model.
        folder: the output folder; created if it does not exist, and must not have a checkpoint yet.
        layout: see `tttlm.save_pretrained`, like the arguments below.
        origin: the source of token ids and of the tokenizer's files.
        shard_bytes: largest size in bytes of one file of safetensors.
        train_state: whether to write a train state in the layout `official_jax`.

    Returns:
        The written tensors, in the order of the files.

    Raises:
        InputError: the layout has no such model, or the folder cannot be written.
    """
    architecture = architecture_for(source.config, layout=layout)
    values = kept_values(origin, architecture, source.config)
    check_there(origin)
    written = []

    def read(part: Part) -> np.ndarray:
        value = source.read(part.path, part.repeat)
        shape = part.entry.save(np.broadcast_to(np.float32(0), value.shape)).shape
        written.append(Converted(part.name, source.name(part.path, part.repeat), shape, value.dtype.name))
        return value

    write_checkpoint(
        folder,
        architecture,
        source.config,
        values,
        read,
        lambda part: source.dtype(part.path, part.repeat),
        shard_bytes=shard_bytes,
        train_state=train_state,
    )
    copy_files(origin, folder)
    return written


def streamed_logits(source: Parameters, tokens: np.ndarray) -> Float[np.ndarray, "B T V"]:
    """Logits of a model in float32, with one repeat of the pattern in memory at a time.

    Args:
        source: the model.
        tokens: ids `[B, T]`.
    """
    config = replace(source.config, num_layers=len(source.config.mixers), dtype="float32", param_dtype="float32")
    graph, state = nnx.split(nnx.eval_shape(lambda: Pattern(config, rngs=nnx.Rngs(0))))
    # The largest are read first, while no others are in memory.
    abstract = sorted(nnx.to_flat_state(state), key=lambda item: -item[1].size)

    @jax.jit
    def run(parameters, h):
        return nnx.merge(graph, parameters)(h, None, None, 1.0)[0]

    def read(path: Place, repeat: int | None = None) -> np.ndarray:
        return source.read(path, repeat).astype(np.float32, copy=False)

    h = jnp.asarray(source.read(("embed", "embedding"), None)[tokens].astype(np.float32))
    for repeat in range(source.config.repeats):
        parameters = [(path, v.replace(jnp.asarray(read(("stack", *path), repeat)))) for path, v in abstract]
        h = jax.block_until_ready(run(nnx.from_flat_state(parameters), h))
        del parameters  # before the next are read
    x = np.asarray(h)
    x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + config.norm_eps) * read(("norm", "scale"))
    embedding = source.read(("embed" if config.tie_embeddings else "lm_head", "embedding"), None)
    rows = range(0, config.vocab_size, _ROWS)
    return np.concatenate([x @ embedding[i : i + _ROWS].astype(np.float32).T for i in rows], axis=-1)


def largest_difference(
    one: Parameters, other: Parameters, *, num_tokens: int = 32, seed: int = 0
) -> tuple[float, float]:
    """(largest difference, largest absolute value) of the logits of two models for the same random tokens."""
    tokens = np.random.default_rng(seed).integers(0, one.config.vocab_size, (1, num_tokens))
    a, b = streamed_logits(one, tokens), streamed_logits(other, tokens)
    return float(np.max(np.abs(a - b))), float(np.max(np.abs(a)))
