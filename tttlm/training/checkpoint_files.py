"""Checkpoints on disk: listing them, reading one, and telling damage from other errors while reading."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from tttlm.errors import InputError
from tttlm.records import RecordError, from_plain
from tttlm.training.digests import digests
from tttlm.training.sharding import path_name

FORMAT = 3  # raised when what is saved changes in a way that older code cannot read
_PARTS = ("_CHECKPOINT_METADATA", "params", "rest")

# Codes of TensorStore for errors of access, which do not show that a file is damaged.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b"
)
# System errors for a file that is missing or altered; all other system errors count as temporary.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Damaged(Exception):
    """Raised for a checkpoint that differs from what was saved; the message says how."""


class Unreadable(Exception):
    """Raised if a checkpoint cannot be read at the moment but may be valid; the message is the cause."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Metadata of a checkpoint.

    Attributes:
        format: the version of the format.
        params, rest: dtype and checksum of every array, see `digests`.
        totals: plain values that were saved with the arrays.
        sha256: the digest of all of the attributes.
        step: the step, which is the name of the checkpoint; None if it was not recorded.
        run: the identity of the run, see `tttlm.training.config.identity`; "" if it was not recorded.
    """

    format: int
    params: dict[str, str]
    rest: dict[str, str]
    totals: dict[str, int | float]
    sha256: str = ""
    step: int | None = None
    run: str = ""

    def sealed(self) -> "Facts":
        """Returns the metadata with its digest."""
        return dataclasses.replace(self, sha256=self._digest())

    def check(self) -> None:
        """Raises `Damaged` if the digest does not match."""
        if self.sha256 != self._digest():
            raise Damaged("its metadata is not what was saved")

    def _digest(self) -> str:
        values = dataclasses.asdict(dataclasses.replace(self, sha256=""))
        unknown = {"step": None, "run": ""}  # not in checkpoints that were saved before they were recorded
        values = {name: value for name, value in values.items() if name not in unknown or value != unknown[name]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, in order; other files and folders are ignored.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        return sorted(int(path.name) for path in folder.iterdir() if is_checkpoint(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): try again once it can be") from None


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint and at least a part of its files."""
    return bool(re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name)) and any((path / part).exists() for part in _PARTS)


def pick_step(folder: Path, step: int | None) -> int:
    """Returns `step`, or the newest saved step.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{folder} has no checkpoint yet: the command that started the run trains on and saves one")
    if step is not None and step not in steps:
        raise InputError(f"{folder} does not have a checkpoint of step {step}; it has {steps}")
    return steps[-1] if step is None else step


def read_facts(path: Path, run: str = "") -> Facts:
    """Reads the metadata of a checkpoint.

    Args:
        path: the checkpoint.
        run: the identity of the run that it must be of; "" accepts any.

    Raises:
        Damaged: the metadata is not what was saved, or is that of another step or run.
        Unreadable: it cannot be read at the moment.
        InputError: another version of the program saved it.
    """
    with reading():
        values = ocp.checkpointables_metadata(path.absolute()).custom_metadata
        if not isinstance(values, dict) or not isinstance(values.get("format"), int):
            raise Damaged("its metadata cannot be read")
        if values["format"] != FORMAT:
            raise InputError(
                f"checkpoint {path} was saved by another version of tttlm (format {values['format']}, this version "
                f"reads {FORMAT}): use the version that saved it, or train again in another run directory"
            )
        facts = from_plain(values, Facts)
        facts.check()
        if facts.step not in (None, int(path.name)):
            raise Damaged(f"it was saved as that of step {facts.step}")
        if run and facts.run not in ("", run):
            raise Damaged("it was saved by a run of another configuration")
        return facts


def checkpoint_digest(folder: Path, step: int) -> str:
    """The digest of the metadata of a checkpoint, which has the digests of its arrays.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / str(step)
    try:
        return read_facts(path).sha256
    except (Damaged, Unreadable) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}): restore it from a copy") from None


def read_arrays(path: Path, facts: Facts, like: dict[str, Any]) -> dict[str, Any]:
    """Reads arrays of a checkpoint in the dtypes that they were saved in, and checks the digest of each.

    Args:
        path: the checkpoint.
        facts: see `read_facts`.
        like: `params`, `rest` or both, as `jax.ShapeDtypeStruct`s with shardings in the structure that was saved.

    Raises:
        Damaged: an array is not what was saved.
        Unreadable: it cannot be read at the moment.
    """
    loaded = load_arrays(path, facts, like)
    check_values(loaded, facts)
    return loaded


def load_arrays(path: Path, facts: Facts, like: dict[str, Any]) -> dict[str, Any]:
    """The first half of `read_arrays`, which each process does for itself."""
    with reading():
        wanted = {name: _as_saved(tree, getattr(facts, name)) for name, tree in like.items()}
        return ocp.load_checkpointables(path.absolute(), wanted)


def check_values(loaded: dict[str, Any], facts: Facts) -> None:
    """The second half of `read_arrays`, for which all processes must have loaded theirs: they compute together."""
    for name, tree in loaded.items():
        for array, digest in digests(tree).items():
            if getattr(facts, name).get(array) != digest:
                raise Damaged(f"the values of {name}/{array} are not those that were saved")


def check_listing(path: Path, facts: Facts) -> None:
    """Checks that a checkpoint lists every array that `facts` names, in its dtype; the values are not read.

    Raises:
        Damaged: an array is missing or has another dtype.
        Unreadable: it cannot be read at the moment.
    """
    with reading():
        listed = ocp.checkpointables_metadata(path.absolute()).metadata
        for name in ("params", "rest"):
            leaves = jax.tree_util.tree_leaves_with_path(listed[name], is_leaf=lambda x: hasattr(x, "dtype"))
            there = {path_name(where): str(np.dtype(x.dtype)) for where, x in leaves if hasattr(x, "dtype")}
            for array, digest in getattr(facts, name).items():
                if there.get(array) != digest.partition(":")[0]:
                    raise Damaged(f"it does not list {name}/{array}")


def load_params(folder: Path, abstract: Any, step: int | None = None, *, run: str = "") -> tuple[int, Any]:
    """Loads (step, parameters) of one checkpoint of a run, the newest by default, without its optimiser.

    If a concurrent training deletes the checkpoint while it is read, the newest one is read instead, unless `step`
    names the deleted one.

    Args:
        folder: the `checkpoints` folder of a run.
        abstract: `jax.ShapeDtypeStruct`s in the structure of the parameters; shapes must match, dtypes may differ.
            Arrays without a sharding are placed on the first device.
        step: the step of the checkpoint; None takes the newest.
        run: the identity of the run, see `tttlm.training.config.identity`; "" accepts any.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or of another run.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=here), abstract)
    for _ in range(100):
        chosen = pick_step(folder, step)
        path = folder / str(chosen)
        try:
            params = read_arrays(path, read_facts(path, run), {"params": abstract})["params"]
            return chosen, jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, abstract)
        except (Damaged, Unreadable) as error:
            if step is None and pick_step(folder, None) != chosen:
                continue  # deleted while it was read: there is a newer one
            if not path.exists():
                raise InputError(f"checkpoint {path} was deleted while it was read: choose another step") from None
            if isinstance(error, Damaged):
                raise InputError(
                    f"checkpoint {path} is damaged ({error}): choose another step, or restore it from a copy"
                ) from None
            raise InputError(f"checkpoint {path} cannot be read ({error}): try again once it can be") from None
    raise InputError(f"{folder}: checkpoints are deleted faster than they can be read: choose a step that is kept")


def check_path(folder: Path) -> None:
    """Refuses a folder from which checkpoints cannot be read back, by saving a small one there and reading it.

    The libraries that write checkpoints interpret some names as patterns or addresses. The folder need not exist; the
    files of the trial are removed. With several processes only the name is checked.

    Raises:
        InputError: nothing can be written there, or it cannot be read back.
    """
    pattern = next((letter for letter in "*?[\\" if letter in str(folder.absolute())), None)
    if pattern:
        raise InputError(
            f"{folder}: the library that writes checkpoints reads {pattern!r} in a path as part of a pattern: "
            "choose another --run"
        )
    if jax.process_count() > 1:
        return  # saving waits for every process; the first checkpoint of the run is read back anyway
    value = np.arange(3, dtype=np.float32)
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix="trial-", dir=folder))
        with _quiet(), _by_itself():
            ocp.save_checkpointables((made / "0").absolute(), {"params": {"trial": jnp.asarray(value)}})
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = {"params": {"trial": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here)}}
            read = ocp.load_checkpointables((made / "0").absolute(), like)["params"]["trial"]
            if not np.array_equal(read, value):
                raise ValueError("other values were read")
    except Exception as error:
        raise InputError(
            f"{folder}: a checkpoint written there cannot be read back ({first_cause(error)}): choose another --run"
        ) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _as_saved(tree: Any, facts: dict[str, str]) -> Any:
    """The abstract arrays of `tree` with the dtypes of `facts` (see `digests`), in which they were saved."""

    def saved(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path_name(path)
        if name not in facts:
            raise Damaged(f"it has no array {name}")
        return x.update(dtype=jnp.dtype(facts[name].partition(":")[0]))

    return jax.tree_util.tree_map_with_path(saved, tree)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns exceptions of libraries that read a checkpoint into `Damaged` or `Unreadable`.

    Only wrong bytes count as damage; an error of the system, memory or a device says nothing about the checkpoint.
    """
    try:
        with _quiet(), _by_itself():
            yield
    except (Damaged, Unreadable, InputError):
        raise
    except RecordError as error:
        raise Damaged(f"its metadata cannot be read: {error}") from None
    except Exception as error:
        raise (Damaged if _shows_damage(error) else Unreadable)(first_cause(error)) from None


def _shows_damage(error: BaseException) -> bool:
    damaged = False
    while error is not None:
        system = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))  # as TensorStore puts it
        number = int(system[1]) if system else getattr(error, "errno", None)
        if number is not None:
            return number in _GONE
        if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)) or _PASSING.search(str(error)[:200]):
            return False
        damaged |= isinstance(error, (ValueError, KeyError, EOFError, FileNotFoundError, NotADirectoryError))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return damaged


def first_cause(error: BaseException) -> str:
    """The first line of the exception that was the first cause, or the error of the operating system."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if system := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):
        return os.strerror(int(system[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Each process reads without waiting for the others, one of which may fail and never arrive."""
    if jax.process_count() == 1:
        yield
        return
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    with ocp.Context(multiprocessing_options=alone):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences orbax's log of a damaged checkpoint, which is reported in one line instead."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
