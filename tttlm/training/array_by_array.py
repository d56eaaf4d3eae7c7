"""The parameters of a checkpoint written and read one array at a time, for models that need not fit in memory."""

import contextlib
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from tttlm.errors import CannotWrite
from tttlm.training.checkpoint_files import FORMAT, Damaged, Facts, first_cause, reading
from tttlm.training.digests import digest_of, digests

# Compressed arrays stay in memory, one after another.
_UNCOMPRESSED = ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_compression=False))
_PARTIAL = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))


def read_array(path: Path, facts: Facts, where: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Reads one parameter of a checkpoint, and checks its digest.

    Args:
        path: the checkpoint.
        facts: see `tttlm.training.checkpoint_files.read_facts`.
        where: the keys of the parameter in the nested dicts.
        like: its shape; the dtype is that in which it was saved.

    Raises:
        Damaged: the array is not what was saved.
        Unreadable: it cannot be read at the moment.
    """
    name = name_of(where)
    if name not in facts.params:
        raise Damaged(f"it has no array {name}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    gc.collect()  # arrays that were loaded before are in reference cycles of the library
    saved = like.update(sharding=here, dtype=jnp.dtype(facts.params[name].partition(":")[0]))
    with reading(), ocp.Context(pytree_options=_PARTIAL):
        loaded = ocp.load_checkpointables(path.absolute(), {"params": _nested(where, saved)})["params"]
    value = np.asarray(jax.tree.leaves(loaded)[0])
    if digest_of(value) != facts.params[name]:
        raise Damaged(f"the values of params/{name} are not those that were saved")
    return value


def write_arrays(
    path: Path,
    shapes: Any,
    value: Callable[[tuple[Any, ...], jax.ShapeDtypeStruct], np.ndarray],
    rest: Any,
    run: str = "",
) -> None:
    """Writes a checkpoint as `tttlm.training.checkpoints.Checkpoints` does, with one parameter in memory at a time.

    Every parameter is read back. The checkpoint appears under its name when it is complete.

    Args:
        path: the checkpoint, named by its step; its folder must exist.
        shapes: nested dicts of `jax.ShapeDtypeStruct`.
        value: gives the values of a parameter by its keys and its shape.
        rest: a tree of small arrays.
        run: the identity of the run, see `tttlm.training.config.identity`.

    Raises:
        CannotWrite: it could not be written.
    """
    leaves = [(keys_of(where), x) for where, x in jax.tree_util.tree_leaves_with_path(shapes)]
    sums = {}
    with tempfile.TemporaryDirectory(prefix="writing-", dir=path.parent) as name:
        arrays, whole = (Path(name).absolute() / part for part in ("arrays", "whole"))
        for where, x in leaves:
            array = jax.device_put(value(where, x))  # `jnp.asarray` makes two copies
            sums[name_of(where)] = digest_of(np.asarray(array))
            with _writing(path):
                ocp.partial.save(arrays, _nested(where, array))
            del array  # before the next is read
        facts = Facts(FORMAT, sums, digests(rest), {}, step=int(path.name), run=run).sealed()
        with _writing(path):
            ocp.partial.finalize(arrays)
            parts = {"params": {"in": jnp.ones(())}, "rest": rest}  # in place of the arrays, which are written
            ocp.save_checkpointables(whole, parts, custom_metadata=asdict(facts))
            shutil.rmtree(whole / "params")
            (written,) = (part for part in arrays.iterdir() if part.is_dir())
            written.rename(whole / "params")
            for where, x in leaves:
                read_array(whole, facts, where, x)
            whole.rename(path)


def keys_of(where: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys of a path within nested dicts."""
    return tuple(getattr(part, "key", part) for part in where)


def name_of(where: tuple[Any, ...]) -> str:
    """The keys of a parameter as `blocks/mixer/kernel`."""
    return "/".join(map(str, where))


def _nested(where: tuple[Any, ...], leaf: Any) -> Any:
    for key in reversed(where):
        leaf = {key: leaf}
    return leaf


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns exceptions of the library that writes checkpoints into `CannotWrite`."""
    try:
        with ocp.Context(array_options=_UNCOMPRESSED):
            yield
    except Exception as error:
        raise CannotWrite(f"checkpoint {path} could not be written ({first_cause(error)})") from None
