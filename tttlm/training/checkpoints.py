"""The checkpoints of a run: written in the background, read back before they count as saved, kept by policy."""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tttlm.errors import CannotWrite, InputError
from tttlm.training.checkpoint_files import (
    FORMAT,
    Damaged,
    Facts,
    Unreadable,
    check_listing,
    check_values,
    first_cause,
    is_checkpoint,
    load_arrays,
    read_arrays,
    read_facts,
    saved_steps,
)
from tttlm.training.cluster import first_of, is_first, say
from tttlm.training.config import CheckpointConfig
from tttlm.training.digests import digests

T = TypeVar("T")

_READ_BACK = 1 << 28  # largest state in bytes that is read back in full: a second copy of more may not fit the devices


class Restored(NamedTuple):
    """A checkpoint that was read: its step, its arrays and its totals."""

    step: int
    params: Any
    rest: Any
    totals: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`.

    Each has `params` and `rest` (optimiser and counters) separately, so that parameters can be loaded alone, a digest
    of every array, and a digest of the metadata. A checkpoint appears under its name when it is complete; a process
    killed while writing leaves nothing that looks like a checkpoint. A checkpoint is read back before it counts as
    saved: the first one of a process in full if it is small and there is one process, others by their list of arrays.

    Other files and folders in the folder are ignored.

    Args:
        folder: the folder of the checkpoints; created if it does not exist.
        config: the policy by which checkpoints are kept.
        run: the identity of the run, see `tttlm.training.config.identity`; checkpoints of others are not read.

    Raises:
        InputError: the folder cannot be read or created.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, run: str = "") -> None:
        self._folder, self._run = folder, run
        self._saving: tuple[int, Facts, dict[str, Any]] | None = None
        self._read_back = False
        try:
            self._orbax = ocp.training.Checkpointer(
                folder.absolute(), preservation_policy=_Kept(config, folder), cleanup_tmp_directories=True
            )
        except Exception as error:
            raise InputError(
                f"{folder} cannot be used ({first_cause(error)}): nothing was changed, try again once it can be"
            ) from None

    def save(self, step: int, params: Any, rest: Any, totals: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied, usually long before they are on disk.

        Args:
            step: the name of the checkpoint; one of that name is replaced.
            params: nested dicts of arrays.
            rest: a tree of arrays.
            totals: plain values to store with the arrays.

        Raises:
            CannotWrite: it cannot be written; earlier checkpoints are intact.
        """
        facts = Facts(FORMAT, digests(params), digests(rest), totals, step=step, run=self._run).sealed()
        arrays = {"params": params, "rest": rest}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
        self._saving = (step, facts, like)
        try:
            self._orbax.save_checkpointables_async(
                step, arrays, force=True, overwrite=True, custom_metadata=_plain(facts)
            )
        except Exception as error:
            raise self._failed(first_cause(error)) from None

    def newest(self, params: Any, rest: Any) -> Restored | None:
        """Reads the newest valid checkpoint; None if there are no checkpoints.

        Damaged ones that are newer are reported on standard error and renamed to `<step>.damaged`, once a valid one was
        read. Nothing is changed if there is none.

        Args:
            params, rest: `jax.ShapeDtypeStruct`s with shardings, in the structure that was saved. The mesh and the
                dtypes may differ from those that were saved.

        Raises:
            InputError: all checkpoints are damaged, or one cannot be read at the moment, or another version of the
                program saved it.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(saved_steps(self._folder)):
            like = {"params": params, "rest": rest}
            result = self._read(step, like)
            if isinstance(result, str):
                damaged.append((step, result))
                continue
            facts, loaded = result
            for other, cause in damaged:
                say(f"checkpoint {self._folder / str(other)} is damaged ({cause}); resuming from the one before")
                self._set_aside(other)
            loaded = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), loaded, like)
            return Restored(step, loaded["params"], loaded["rest"], facts.totals)
        causes = [f"step {step}: {cause}" for step, cause in damaged]
        causes += [f"{path.name} was set aside" for path in sorted(self._folder.glob("*.damaged*"))]
        if causes:
            raise InputError(
                f"{self._folder}: no checkpoint is valid ({'; '.join(causes)}): restore a copy of one, "
                "or start again in another run directory"
            )
        return None

    def _read(self, step: int, like: dict[str, Any]) -> tuple[Facts, dict[str, Any]] | str:
        """The checkpoint, or what is wrong with it; every process returns the same.

        Raises:
            InputError: it cannot be read at the moment, or another version saved it; it is left as it is.
        """
        path = self._folder / str(step)
        try:
            facts = _together(lambda: read_facts(path, self._run))
            loaded = _together(lambda: load_arrays(path, facts, like))  # the next begins only if all have theirs
            _together(lambda: check_values(loaded, facts))
        except Unreadable as error:
            raise InputError(
                f"checkpoint {path} cannot be read ({error}): nothing was changed, try again once it can be"
            ) from None
        except Damaged as error:
            return str(error)
        return facts, loaded

    def _set_aside(self, step: int) -> None:
        if is_first():
            names = [f"{step}.damaged", *(f"{step}.damaged.{n}" for n in range(1, 1000))]
            free = next(self._folder / name for name in names if not (self._folder / name).exists())
            (self._folder / str(step)).rename(free)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._orbax.reload()

    @property
    def last(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        return max(saved_steps(self._folder), default=0)

    def wait(self) -> None:
        """Waits until everything is on disk and read back; must be called before the next checkpoint is saved.

        Raises:
            CannotWrite: the last checkpoint could not be written or read back; earlier ones are intact.
        """
        cause = ""
        try:
            self._orbax.wait()
        except Exception as error:
            cause = first_cause(error)
        if not cause and self._saving is not None:
            cause = self._check(*self._saving)
        if cause := first_of(cause):
            raise self._failed(cause)
        self._saving = None

    def _check(self, step: int, facts: Facts, like: dict[str, Any]) -> str:
        """Reads back the checkpoint; returns what is wrong with it, "" if nothing is."""
        path = self._folder / str(step)
        try:
            if read_facts(path) != facts and is_first():  # the totals of process 0 were written
                return "its metadata reads back differently"
            check_listing(path, facts)
            alone = jax.process_count() == 1  # digests are computed by all processes or by none
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
            if alone and not self._read_back and size <= _READ_BACK:
                read_arrays(path, facts, like)
                self._read_back = True
        except (Damaged, Unreadable, InputError) as error:
            return f"it does not read back: {error}"
        return ""

    def _failed(self, cause: str) -> CannotWrite:
        step = self._saving[0] if self._saving else 0
        self._saving = None
        if is_first():  # remove the incomplete checkpoint
            for _ in range(50):  # other writers may still be writing
                for left in self._folder.glob(f"{step}.*tmp*"):
                    shutil.rmtree(left, ignore_errors=True)
                time.sleep(0.01)
            if is_checkpoint(self._folder / str(step)):
                self._set_aside_unread(step)
        self._orbax.reload()
        intact = f"that of step {self.last} is intact" if self.last else "there is none before it"
        return CannotWrite(f"checkpoint {self._folder / str(step)} could not be written ({cause}); {intact}")

    def _set_aside_unread(self, step: int) -> None:
        with contextlib.suppress(OSError):
            (self._folder / str(step)).rename(self._folder / f"{step}.unread")

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and frees all resources."""
        with contextlib.suppress(CannotWrite):  # `wait` reports it
            self.wait()
        self._orbax.close()


def _together(read: Callable[[], T]) -> T:
    """What `read` returns; if it fails in one process, every process raises that, so that none waits for another."""
    result: T | None = None
    causes: dict[type[Exception], str] = dict.fromkeys((InputError, Unreadable, Damaged), "")
    try:
        result = read()
    except tuple(causes) as error:
        causes[next(kind for kind in causes if isinstance(error, kind))] = str(error)
    for kind, cause in causes.items():
        if cause := first_of(cause):
            raise kind(cause)
    return result  # type: ignore[return-value]


class _Kept:
    """The policy by which orbax keeps checkpoints: the newest, multiples, and folders that are not checkpoints."""

    def __init__(self, config: CheckpointConfig, folder: Path) -> None:
        self._config, self._folder = config, folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints if self._ours(info.step))
        last, every = steps[-self._config.keep_last :], self._config.keep_every
        keep: Callable[[int], bool] = lambda step: step in last or bool(every and step % every == 0)
        return [not self._ours(info.step) or keep(info.step) for info in checkpoints]

    def _ours(self, step: int) -> bool:
        path = self._folder / str(step)
        return not path.exists() or is_checkpoint(path)  # one that is being written does not exist yet


def _plain(facts: Facts) -> dict[str, Any]:
    return {field.name: getattr(facts, field.name) for field in fields(facts)}
