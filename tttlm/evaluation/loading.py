"""Loads a model from its folder, a run or a released model with a tokenizer, on one device or on a mesh."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from tttlm.data import Tokenizer, load_tokenizer
from tttlm.errors import InputError
from tttlm.evaluation.run import Run, load_run
from tttlm.interop import from_pretrained, is_pretrained
from tttlm.model import LanguageModel
from tttlm.training.config import MeshConfig
from tttlm.training.run_folder import RunFolder
from tttlm.training.sharding import check_model_mesh, make_mesh, tree_shardings


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer.

    Attributes:
        path: The folder, as given.
        model: The model, bound to its parameters.
        tokenizer: The tokenizer of the model.
        trained_length: Sequence length in tokens of its training; None if the folder does not have it.
        run: The run; None for a released folder.
    """

    path: str
    model: LanguageModel
    tokenizer: Tokenizer
    trained_length: int | None
    run: Run | None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None for a released folder."""
        return None if self.run is None else self.run.step


def load_model(path: str, *, tokenizer: str = "", step: int | None = None, mesh: Mesh | None = None) -> Loaded:
    """Reads a run, or a released folder.

    Args:
        path: The folder.
        tokenizer: A tokenizer file, a folder with one, or "bytes", for a released folder without one; a run has its
            own.
        step: The step of the checkpoint of a run; None is the newest.
        mesh: Devices that the model is sharded over; None uses one device.

    Raises:
        InputError: The folder is neither, cannot be read, or does not match the tokenizer.
    """
    folder, run, length = Path(path), None, None
    if RunFolder(folder).config.exists():
        run = load_run(folder, step)
        found = run.tokenizer()
        if tokenizer and load_tokenizer(tokenizer).fingerprint != found.fingerprint:
            raise InputError(f"{path} was trained with another tokenizer than {tokenizer}: leave out --tokenizer")
        model, length = run.model, run.config.sequence_length
    elif is_pretrained(folder):
        if step is not None:
            raise InputError(f"{path} is a released model, which has no steps: leave out --step")
        found = load_tokenizer(tokenizer or folder)
        model = from_pretrained(folder)
        if found.vocab_size > model.config.vocab_size:
            raise InputError(
                f"{path} knows {model.config.vocab_size:,} tokens, the tokenizer has {found.vocab_size:,}: it is that "
                "of another model, name the right one with --tokenizer"
            )
    else:
        raise InputError(f"{path} is neither the folder of a run (config.yaml) nor a released model (config.json)")
    if mesh is not None:
        model = sharded(model, mesh)
    return Loaded(path, model, found, length, run)


def sharded(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model, with its parameters sharded over the mesh as in training.

    Raises:
        InputError: Its heads or channels are not divisible by the number of shards.
    """
    check_model_mesh(mesh, model.config)
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, jax.device_put(params, tree_shardings(model.config, params, mesh)))
    return nnx.merge(graph, state)


@contextmanager
def on_mesh(config: MeshConfig) -> Iterator[Mesh | None]:
    """Sets the mesh of `config` as JAX's context; yields None for one device.

    Raises:
        InputError: There are fewer devices.
    """
    sizes = [getattr(config, field.name) for field in fields(config)]
    if math.prod(sizes) == 1:
        yield None
        return
    count = len(jax.devices()) if -1 in sizes else math.prod(sizes)
    mesh = make_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        yield mesh
