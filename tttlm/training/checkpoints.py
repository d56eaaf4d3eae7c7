"""The checkpoints of a run: written in the background, read back before they count, kept by policy."""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    first_cause,
    is_checkpoint,
    read_arrays,
    read_facts,
    saved_steps,
)
from tttlm.training.cluster import first_of, is_first, say
from tttlm.training.config import CheckpointConfig
from tttlm.training.digests import digests

_READ_BACK = 1 << 28  # bytes of a state that are read back in full: a second copy of more may not fit the devices


class Found(NamedTuple):
    """A checkpoint that was read: its step, and what was saved with it."""

    step: int
    params: Any
    rest: Any
    totals: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`.

    Each holds `params` and `rest` (optimiser and counters), apart, so that parameters load alone, a digest of every
    array, and one of what is written beside them. A checkpoint appears under its name when it is whole; a process
    killed while writing leaves nothing that a later one could take for a checkpoint. What was written is read back
    before it is called saved: the first one of a process in full where it is small and the process trains alone, others
    in their listing of arrays.

    Other files and folders beside the checkpoints are left alone.

    Args:
        folder: where they are; made if need be.
        config: which of them are kept.

    Raises:
        InputError: the folder cannot be read or made.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder
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
            totals: plain values to give back with the arrays.

        Raises:
            CannotWrite: it cannot be written; those before are intact.
        """
        facts = Facts(FORMAT, digests(params), digests(rest), totals).sealed()
        arrays = {"params": params, "rest": rest}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
        self._saving = (step, facts, like)
        try:
            self._orbax.save_checkpointables_async(
                step, arrays, force=True, overwrite=True, custom_metadata=_plain(facts)
            )
        except Exception as error:
            raise self._failed(first_cause(error)) from None

    def newest(self, params: Any, rest: Any) -> Found | None:
        """The newest checkpoint that is sound, or None when there is none at all.

        Damaged ones that are newer are announced on standard error and set aside as `<step>.damaged`, once a sound one
        was found. Nothing is changed where there is none.

        Args:
            params, rest: `jax.ShapeDtypeStruct`s with shardings, in the structure that was saved. The mesh may be
                another than the one that saved, the dtypes too.

        Raises:
            InputError: there are checkpoints and every one is damaged, or one cannot be read now, or another version
                of the program saved it.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(saved_steps(self._folder)):
            like = {"params": params, "rest": rest}
            found = self._read(step, like)
            if isinstance(found, str):
                damaged.append((step, found))
                continue
            facts, loaded = found
            for other, cause in damaged:
                say(f"checkpoint {self._folder / str(other)} is damaged ({cause}); going on from the one before")
                self._set_aside(other)
            loaded = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), loaded, like)
            return Found(step, loaded["params"], loaded["rest"], facts.totals)
        causes = [f"step {step}: {cause}" for step, cause in damaged]
        causes += [f"{path.name} was set aside" for path in sorted(self._folder.glob("*.damaged*"))]
        if causes:
            raise InputError(
                f"{self._folder}: no checkpoint is sound ({'; '.join(causes)}): put back a copy of one, "
                "or start again in another run folder"
            )
        return None

    def _read(self, step: int, like: dict[str, Any]) -> tuple[Facts, dict[str, Any]] | str:
        """The checkpoint, or what is wrong with it, with the same answer in every process.

        Raises:
            InputError: it cannot be read now, or another version saved it; it is left as it is.
        """
        path, found = self._folder / str(step), None
        refused = passing = damage = ""
        try:
            facts = read_facts(path)
            found = facts, read_arrays(path, facts, like)
        except InputError as error:
            refused = str(error)
        except Unreadable as error:
            passing = f"checkpoint {path} cannot be read ({error}): nothing was changed, try again once it can be"
        except Damaged as error:
            damage = str(error)
        # All processes have read, or none goes on: what comes now they do together.
        if refused := first_of(refused) or first_of(passing):
            raise InputError(refused)
        return first_of(damage) or found or "another process could not read it"

    def _set_aside(self, step: int) -> None:
        if is_first():
            names = [f"{step}.damaged", *(f"{step}.damaged.{n}" for n in range(1, 1000))]
            free = next(self._folder / name for name in names if not (self._folder / name).exists())
            (self._folder / str(step)).rename(free)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._orbax.reload()

    @property
    def last(self) -> int:
        """The step of the newest checkpoint that is whole; 0 when there is none."""
        return max(saved_steps(self._folder), default=0)

    def wait(self) -> None:
        """Returns when everything is on disk and was read back; to be called before the next one is saved.

        Raises:
            CannotWrite: the last checkpoint could not be written or read back; those before are intact.
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
        """Reads back what was saved; what is wrong with it, "" for nothing."""
        path = self._folder / str(step)
        try:
            if read_facts(path) != facts and is_first():  # the first process's totals are the ones that were written
                return "its description reads back otherwise"
            check_listing(path, facts)
            alone = jax.process_count() == 1  # digests are computed by all processes together, or by none
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
        if is_first():  # what there is of a checkpoint that could not be finished only takes room
            for _ in range(50):  # other writers may not have given up yet
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
        """Waits for what is being written, and lets go of everything."""
        with contextlib.suppress(CannotWrite):  # whoever cares has waited
            self.wait()
        self._orbax.close()


class _Kept:
    """Which checkpoints are kept, as orbax asks for it: the last ones, multiples, and whatever is no checkpoint."""

    def __init__(self, config: CheckpointConfig, folder: Path) -> None:
        self._config, self._folder = config, folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints if self._ours(info.step))
        last, every = steps[-self._config.keep_last :], self._config.keep_every
        keep: Callable[[int], bool] = lambda step: step in last or bool(every and step % every == 0)
        return [not self._ours(info.step) or keep(info.step) for info in checkpoints]

    def _ours(self, step: int) -> bool:
        path = self._folder / str(step)
        return not path.exists() or is_checkpoint(path)  # one that is being written is not there yet


def _plain(facts: Facts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in ("format", "params", "rest", "totals", "sha256")}
