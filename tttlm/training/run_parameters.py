"""The parameters of a run one by one, and a run that is made of parameters from elsewhere."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from tttlm.data import Tokenizer
from tttlm.errors import InputError
from tttlm.model import ModelConfig
from tttlm.records import write_file, write_json
from tttlm.training.array_by_array import read_array, write_arrays
from tttlm.training.checkpoint_files import Damaged, Unreadable, check_path, pick_step, read_facts
from tttlm.training.config import TrainConfig, identity, to_dict
from tttlm.training.run_folder import RunFacts, RunFolder, with_head
from tttlm.training.step import Model


class RunParameters:
    """The parameters in a checkpoint of a run, each read and checked against its digest when it is asked for.

    Attributes:
        folder: The run's folder.
        config: The configuration of its model.
        step: The step of the checkpoint.

    Raises:
        InputError: it is no run, or has no such checkpoint.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.folder = RunFolder(path)
        config = self.folder.read_config()
        self.config: ModelConfig = config.model
        self.step = pick_step(self.folder.checkpoints, step)
        self._path = self.folder.checkpoints / str(self.step)
        self._facts = self._tell(lambda: read_facts(self._path, identity(config)))
        self._temporary = tempfile.TemporaryDirectory(prefix="tttlm-")
        self._stacks: dict[tuple[Any, ...], tuple[Path, tuple[int, ...], np.dtype]] = {}
        self._shapes = Model(self.config).shapes

    def name(self, path: tuple[Any, ...], repeat: int | None) -> str:
        return "/".join(map(str, path)) + ("" if repeat is None else f"[{repeat}]")

    def dtype(self, path: tuple[Any, ...], repeat: int | None) -> np.dtype:
        digest = self._facts.params.get(self.name(path, None), f"{self.config.param_dtype}:")
        return jnp.dtype(digest.partition(":")[0])

    def read(self, path: tuple[Any, ...], repeat: int | None) -> np.ndarray:
        """The values of a parameter, or what one repeat has of a stacked one.

        A stack is read once, and kept in a temporary file, from which its repeats are read one by one.
        """
        if repeat is None:
            return self._tell(lambda: self._load(path))
        if path not in self._stacks:
            value = self._tell(lambda: self._load(path))
            file = Path(self._temporary.name) / str(len(self._stacks))
            value.reshape(-1).view(np.uint8).tofile(file)
            self._stacks[path] = (file, value.shape[1:], value.dtype)
        file, shape, dtype = self._stacks[path]
        size = math.prod(shape) * dtype.itemsize
        return np.fromfile(file, np.uint8, size, offset=repeat * size).view(dtype).reshape(shape)

    def _load(self, path: tuple[Any, ...]) -> np.ndarray:
        like: Any = self._shapes
        for part in path:
            like = like[part]
        return read_array(self._path, self._facts, path, like)

    def _tell(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Damaged as error:
            raise InputError(f"checkpoint {self._path} is damaged ({error}): choose another --step") from None
        except Unreadable as error:
            raise InputError(f"checkpoint {self._path} cannot be read ({error}): try again once it can be") from None


def write_run(
    path: Path,
    config: ModelConfig,
    read: Callable[[tuple[Any, ...], int | None], np.ndarray],
    tokenizer: Tokenizer | None,
) -> None:
    """Makes the folder of a run at step 0, whose parameters come from elsewhere; it can be scored and sampled from.

    One parameter is in memory at a time, stacked over the blocks.

    Args:
        path: the folder; it must not be there, or be empty.
        config: the model.
        read: gives the values of a parameter, or of one repeat of a stacked one.
        tokenizer: the tokenizer that the run is to keep; None for none, then only tokens can be scored.

    Raises:
        InputError: there is something in the folder, or it cannot be written.
        CannotWrite: the checkpoint could not be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is there and not empty: choose another folder")
    model = Model(config)

    def value(where: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        if where[0] != "stack":
            return read(where, None).astype(like.dtype, copy=False)
        stacked = np.empty(like.shape, like.dtype)
        for repeat in range(len(stacked)):
            stacked[repeat] = read(where, repeat)
        return stacked

    folder = RunFolder(path)
    try:
        folder.checkpoints.mkdir(parents=True)
        check_path(folder.checkpoints)
        train = TrainConfig(run=str(path), model=config)
        values = to_dict(train)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if tokenizer is not None:
            write_json(folder.facts, RunFacts("", tokenizer.fingerprint, "", ""))
            folder.keep_tokenizer(tokenizer)
        write_arrays(folder.checkpoints / "0", model.shapes, value, {"converted": jnp.ones(())}, identity(train))
        write_file(folder.config, with_head(text).encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make room, or choose another folder") from None
