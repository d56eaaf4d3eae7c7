"""How every array of a run is sharded: the mesh of devices, and rules from a parameter's path to its sharding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tttlm.errors import InputError
from tttlm.model import ModelConfig
from tttlm.model.sharding import STACKED, parameter_axes
from tttlm.parts.partition import BATCH, MESH_AXES, STORAGE
from tttlm.training.config import MeshConfig, TrainConfig

_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all there are), with one axis for each of `MESH_AXES`.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(_sizes(config, len(devices)), MESH_AXES, axis_types=_AUTO, devices=devices)


def imagined_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without its devices: as many as the sizes of all axes say, or with -1 among them as there are here.

    Raises:
        InputError: the axes do not divide the devices that are here.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    count = len(jax.devices()) if -1 in sizes else math.prod(sizes)
    return AbstractMesh(_sizes(config, count), MESH_AXES, axis_types=_AUTO)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if devices % known or (-1 not in sizes and known != devices):
        wanted = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise InputError(f"a mesh of {wanted} does not fit {devices} devices: change `mesh`")
    return tuple(devices // known if size == -1 else size for size in sizes)


def check_mesh(mesh: Mesh | AbstractMesh, config: TrainConfig) -> None:
    """Refuses a run that cannot be sharded evenly over the mesh.

    Raises:
        InputError: rows, tokens, heads or channels are not divisible by the number of devices they are sharded over.
    """
    model, size = config.model, mesh.shape
    shares = size["data"] * size["fsdp"]
    rows = config.batch_size // config.accumulate
    if rows % shares:
        raise InputError(
            f"batch_size / accumulate = {rows} rows is not divisible by the {shares} devices of mesh.data x mesh.fsdp: "
            "mesh.context and mesh.tensor shard what is in a sequence"
        )
    tokens, rest = divmod(config.sequence_length, size["context"])
    if rest:
        raise InputError(
            f"sequence_length = {config.sequence_length} is not divisible by mesh.context = {size['context']}"
        )
    if config.loss_chunk and tokens % min(tokens, config.loss_chunk):
        raise InputError(
            f"loss_chunk = {config.loss_chunk} does not divide the {tokens} tokens of a row that a device holds "
            f"under mesh.context = {size['context']}"
        )
    if tokens < model.conv_kernel - 1 and any(model.conv_before(mixer) for mixer in model.pattern):
        raise InputError(
            f"a device holds {tokens} tokens of a row under mesh.context = {size['context']}, "
            f"fewer than the {model.conv_kernel - 1} that a convolution of model.conv_kernel looks back: lower it"
        )
    shares = size["tensor"] * size["context"]
    for mixer in model.pattern:
        what, count = mixer.sharded
        if count % shares:
            raise InputError(
                f"the {count} {what} of {mixer.name} are not divisible by mesh.tensor x mesh.context = "
                f"{size['tensor']} x {size['context']}: change `mesh`"
            )


def parameter_spec(model: ModelConfig, path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How a parameter of the model is sharded, by the rules of `tttlm.model.sharding` and of its mixers.

    Parameters are sharded over `tensor` as they are used, over `fsdp` to be stored, and over `context` to be stored or,
    within a mixer, as they are used.

    Where `tensor` does not divide its dimension it is left out; `fsdp` and `context`, which only store, go to the
    largest dimension that they divide. Vectors are not sharded over them: gathering one takes longer than it is worth.
    """
    first = 1 if STACKED.search(path) else 0
    rule = parameter_axes(model, path, len(shape) - first)
    sizes = list(shape)  # of the share of a device
    spec: list[tuple[str, ...]] = [()] * len(shape)

    def share(place: int, axis: str) -> bool:
        if sizes[place] % mesh.shape[axis]:
            return False
        sizes[place] //= mesh.shape[axis]
        spec[place] += (axis,)
        return True

    for place, axes in zip(range(first, len(shape)), rule, strict=False):
        for axis in axes.split():
            if mesh.shape[axis] == 1 or (axis in STORAGE and len(shape) - first == 1):
                continue
            if not share(place, axis) and axis in STORAGE:
                any(share(other, axis) for other in sorted(range(first, len(shape)), key=lambda n: -sizes[n]))
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))


def tree_shardings(model: ModelConfig, tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a training state; the optimiser state is sharded as its parameter is.

    The moments of Adam have the parameter's path as the end of their own, so the same rules find them.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(model, path_name(path), leaf.shape, mesh))

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

        by_rank = NamedSharding(mesh, P(*sharding.spec[: rows.ndim]))  # what is said per example has no tokens
        return jax.make_array_from_callback((blocks * size, *rows.shape[1:]), by_rank, part)

    return lambda batch: {name: place(np.asarray(rows)) for name, rows in batch.items()}
