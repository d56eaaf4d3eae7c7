"""Where every array of a run lives: the mesh of devices, and rules from a parameter's path to its sharding."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tttlm.errors import InputError
from tttlm.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")  # the axes that share the rows of a batch

# The first rule whose pattern is found in the path says over which axis each trailing dimension is shared; leading
# dimensions that a rule does not name (the stack of blocks) stay whole. What no rule finds is whole everywhere.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),  # V D
    (r"inner/\d+/kernel$", ("tensor", "fsdp", None)),  # H I O
    (r"inner/\d+/bias$|inner_norm/(scale|bias)$", ("tensor", None)),  # H K
    (r"learning_rate/bias$", ("tensor",)),  # H
    (r"conv\w*/kernel$", (None, "tensor")),  # W D
    (r"conv\w*/bias$", ("tensor",)),  # D
    (r"(o_proj|out_proj|down_proj|down)/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", "tensor")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all there are), with one axis for each of `AXES`.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    wanted = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise InputError(f"a mesh of {wanted} does not fit {len(devices)} devices: change `mesh`")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(mesh: Mesh, *, batch_size: int, accumulate: int, sequence_length: int) -> None:
    """Refuses a batch that the mesh cannot share evenly.

    Raises:
        InputError: rows or tokens do not divide by the devices that share them.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch_size // accumulate
    if rows % shares:
        raise InputError(
            f"batch_size / accumulate = {rows} rows is not divisible by the {shares} devices of mesh.data x mesh.fsdp"
        )
    if sequence_length % mesh.shape["context"]:
        raise InputError(
            f"sequence_length = {sequence_length} is not divisible by mesh.context = {mesh.shape['context']}"
        )


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """How a parameter of this path and shape is shared; an axis that does not divide its dimension is left out."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    spec: list[str | None] = [None] * len(shape)
    for place, axis in zip(range(len(shape) - 1, -1, -1), reversed(axes), strict=False):
        if axis is not None and mesh.shape[axis] > 1 and shape[place] % mesh.shape[axis] == 0:
            spec[place] = axis
    return P(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a training state; optimiser moments lie where their parameter lies.

    The moments of Adam have the parameter's path as the end of their own, so the same rules find them.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of `[B, T]`: rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, P(BATCH, "context"))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `blocks/mixer/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): batches are read in `count` equal shares of their rows, share `index` by this process.

    Processes whose devices hold the same rows, each a part of the model or of the sequence, read the same share.

    Raises:
        InputError: the rows that two processes hold are the same in part only.
    """
    held = _row_blocks(mesh)
    shares = sorted(set(held.values()))
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(set().union(*shares)):
        raise InputError(
            f"mesh.tensor x mesh.context = {mesh.shape['tensor'] * mesh.shape['context']} devices that share a row "
            f"lie across the processes unevenly: let it divide, or be a multiple of, the devices of a process"
        )
    return shares.index(held[jax.process_index()]), len(shares)


def _row_blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Which of the blocks that data and fsdp cut the rows of a batch into each process holds."""
    blocks: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        blocks.setdefault(device.process_index, set()).add(place[0] * mesh.shape["fsdp"] + place[1])
    return {process: tuple(sorted(held)) for process, held in blocks.items()}


def place_batch(mesh: Mesh) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """A function that puts this process's share of a batch (see `row_share`) in its place on the mesh."""
    sharding = batch_sharding(mesh)
    mine, blocks = _row_blocks(mesh)[jax.process_index()], mesh.shape["data"] * mesh.shape["fsdp"]

    def place(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(mine)

        def part(index: Any) -> np.ndarray:
            start = mine.index((index[0].start or 0) // size) * size
            return rows[start : start + size, *index[1:]]

        return jax.make_array_from_callback((blocks * size, *rows.shape[1:]), sharding, part)

    return lambda batch: {name: place(np.asarray(rows)) for name, rows in batch.items()}
