"""Saved training states: written in the background, kept by policy, verified when they are read."""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt
from orbax.checkpoint import v1 as ocp

from tttlm.errors import CannotWrite, InputError
from tttlm.training.cluster import first_of, is_first, say
from tttlm.training.config import CheckpointConfig
from tttlm.training.sharding import path_name

_FORMAT = 2  # raised when what is saved changes in a way that older code cannot read


class Found(NamedTuple):
    """A checkpoint that was read: its step, and what was saved with it."""

    step: int
    params: Any
    rest: Any
    totals: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`.

    Each holds `params` and `rest` (optimiser and counters), apart, so that parameters load alone, and a digest of every
    array. A checkpoint appears under its name when it is whole; a process killed while writing leaves nothing that a
    later one could take for a checkpoint.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._folder, self._saving = folder, 0
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, params: Any, rest: Any, totals: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied, usually long before they are on disk.

        Args:
            totals: plain values to give back with the arrays.

        Raises:
            CannotWrite: it cannot be written; those before are intact.
        """
        facts = {"format": _FORMAT, "params": digests(params), "rest": digests(rest), "totals": totals}
        self._saving = step
        try:
            self._orbax.save_checkpointables_async(
                step, {"params": params, "rest": rest}, force=True, overwrite=True, custom_metadata=facts
            )
        except Exception as error:
            raise self._failed(_first_cause(error)) from None

    def newest(self, params: Any, rest: Any) -> Found | None:
        """The newest checkpoint that is sound, or None when there is none at all.

        Args:
            params, rest: `jax.ShapeDtypeStruct`s with shardings, in the structure that was saved. The mesh may be
                another than the one that saved, the dtypes too.

        A damaged checkpoint is announced on standard error and set aside as `<step>.damaged`.

        Raises:
            InputError: there are checkpoints, and every one is damaged.
        """
        steps = [checkpoint.step for checkpoint in self._orbax.checkpoints]
        for step in reversed(steps):
            facts: dict[str, Any] = {}
            loaded: dict[str, Any] = {}
            cause = ""
            try:
                with _quiet(), _by_itself():
                    facts, loaded = self._read(step, {"params": params, "rest": rest})
            except Exception as error:
                cause = _first_cause(error)
            # All processes have read, or none goes on: what comes now they do together.
            cause = first_of(cause) or _difference(loaded, facts)
            if not cause:
                like = {"params": params, "rest": rest}
                loaded = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), loaded, like)
                return Found(step, loaded["params"], loaded["rest"], facts["totals"])
            say(f"checkpoint {self._folder / str(step)} is damaged ({cause}); going on from the one before")
            self._set_aside(step)
        if steps:
            raise InputError(f"{self._folder}: no checkpoint is sound; start again in another run folder")
        return None

    def _read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was written about a checkpoint, and its arrays in the dtypes they were saved in."""
        path = (self._folder / str(step)).absolute()
        facts = ocp.checkpointables_metadata(path).custom_metadata
        if not facts or facts.get("format") != _FORMAT:
            raise ValueError("its description cannot be read")
        return facts, ocp.load_checkpointables(
            path, {name: _as_saved(tree, facts[name]) for name, tree in like.items()}
        )

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
        """Returns when everything is on disk; to be called before the next one is saved.

        Raises:
            CannotWrite: the last checkpoint could not be written; those before are intact.
        """
        cause = ""
        with _quiet():
            try:
                self._orbax.wait()
            except Exception as error:
                cause = _first_cause(error)
        if cause := first_of(cause):
            raise self._failed(cause)

    def _failed(self, cause: str) -> CannotWrite:
        if is_first():  # what there is of a checkpoint that could not be finished only takes room
            for _ in range(50):  # other writers may not have given up yet
                for left in self._folder.glob(f"{self._saving}.*tmp*"):
                    shutil.rmtree(left, ignore_errors=True)
                time.sleep(0.01)
        self._orbax.reload()
        intact = f"that of step {self.last} is intact" if self.last else "there is none before it"
        return CannotWrite(f"checkpoint {self._folder / str(self._saving)} could not be written ({cause}); {intact}")

    def close(self) -> None:
        with contextlib.suppress(CannotWrite):  # whoever cares has waited
            self.wait()
        self._orbax.close()


def digests(tree: Any) -> dict[str, str]:
    """Dtype and checksum of every array by path; any single changed value changes it, and the mesh does not matter."""
    sums = jax.device_get(_digests(tree))
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(sums), strict=True)
    return {path_name(path): f"{x.dtype}:{digest}" for (path, x), digest in leaves}


def _difference(loaded: dict[str, Any], facts: dict[str, Any]) -> str:
    """Names the first array that is not what was saved; "" when all are."""
    for name, tree in loaded.items():
        for path, digest in digests(tree).items():
            if facts[name].get(path) != digest:
                return f"the values of {name}/{path} are not those that were saved"
    return ""


def _as_saved(tree: Any, facts: dict[str, str]) -> Any:
    """The abstract arrays of `tree` with the dtypes that `facts`, which are `digests`, say they were saved in."""

    def saved(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(dtype=jnp.dtype(facts[path_name(path)].partition(":")[0]))

    return jax.tree_util.tree_map_with_path(saved, tree)


@jax.jit
def _digests(tree: Any) -> Any:
    return jax.tree.map(_digest, tree)


def _digest(x: Array) -> UInt[Array, ""]:
    """The bits of every element times an odd number that depends on its place, summed modulo 2**32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(x.dtype.itemsize, 4) * 8}")).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (place * np.uint32(2654435761) * 2 + 1), dtype=jnp.uint32)


def load_params(folder: Path, abstract: Any, step: int | None = None) -> tuple[int, Any]:
    """(step, parameters) of one checkpoint of a run, the newest by default, without its optimiser.

    Args:
        folder: the `checkpoints` folder of a run.
        abstract: `jax.ShapeDtypeStruct`s in the structure of the parameters; shapes must fit, dtypes may differ. Those
            without a sharding are put on the first device.

    Raises:
        InputError: there is no such checkpoint.
    """
    step = pick_step(folder, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=here), abstract)
    try:
        with _quiet(), _by_itself():
            loaded = ocp.load_checkpointables((folder / str(step)).absolute(), {"params": abstract})
    except Exception as error:
        raise InputError(f"checkpoint {folder / str(step)} cannot be read: {_first_cause(error)}") from error
    return step, loaded["params"]


def pick_step(folder: Path, step: int | None) -> int:
    """`step`, or the newest that is there.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = saved_steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
        raise InputError(f"{folder} does not hold {wanted}; it holds {steps or 'none'}")
    return steps[-1] if step is None else step


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Each process reads what it needs without waiting for others, one of which may meet an error and never come."""
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
    """What orbax logs about a damaged checkpoint is said in one line instead."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _first_cause(error: BaseException) -> str:
    """The first line of the exception that the others were raised from, or what the operating system said."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if system := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):  # as TensorStore puts it
        return os.strerror(int(system[1]))
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
