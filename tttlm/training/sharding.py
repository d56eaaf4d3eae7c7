"""The sharding of every array of a run: the mesh of devices, and rules from a parameter's path to its sharding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tttlm.data import Batch
from tttlm.errors import InputError
from tttlm.model import ModelConfig
from tttlm.model.sharding import STACKED, parameter_axes
from tttlm.parts.partition import BATCH, MESH_AXES, STORAGE
from tttlm.training.config import MeshConfig, TrainConfig

_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all by default), with one axis for each of `MESH_AXES`.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(_sizes(config, len(devices)), MESH_AXES, axis_types=_AUTO, devices=devices)


def imagined_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without its devices. Their number is the product of the axes, or, with -1, that of this machine.

    Raises:
        InputError: the axes do not divide the devices of this machine.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    count = len(jax.devices()) if -1 in sizes else math.prod(sizes)
    return AbstractMesh(_sizes(config, count), MESH_AXES, axis_types=_AUTO)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if devices % fixed or (-1 not in sizes and fixed != devices):
        wanted = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise InputError(f"a mesh of {wanted} does not fit {devices} devices: change `mesh`")
    return tuple(devices // fixed if size == -1 else size for size in sizes)


def check_mesh(mesh: Mesh | AbstractMesh, config: TrainConfig) -> None:
    """Refuses a run that cannot be sharded evenly over the mesh.

    Raises:
        InputError: the number of devices does not divide the examples, tokens, heads or channels sharded over them.
    """
    model, size = config.model, mesh.shape
    shards = size["data"] * size["fsdp"]
    examples = config.batch_size // config.accumulate
    if examples % shards:
        raise InputError(
            f"batch_size / accumulate = {examples} examples is not divisible by mesh.data x mesh.fsdp = {shards}: "
            "change one of them, or use mesh.context or mesh.tensor, which shard within a sequence"
        )
    tokens, rest = divmod(config.sequence_length, size["context"])
    if rest:
        raise InputError(
            f"sequence_length = {config.sequence_length} is not divisible by mesh.context = {size['context']}: "
            "change one of them"
        )
    if config.loss_chunk and tokens % min(tokens, config.loss_chunk):
        raise InputError(
            f"loss_chunk = {config.loss_chunk} does not divide the {tokens} tokens of a sequence that a device holds "
            f"under mesh.context = {size['context']}: change one of them"
        )
    if tokens < model.conv_kernel - 1 and any(model.conv_before(mixer) for mixer in model.pattern):
        raise InputError(
            f"a device holds {tokens} tokens of a sequence under mesh.context = {size['context']}, "
            f"fewer than the {model.conv_kernel - 1} that a convolution reads back: lower mesh.context"
        )
    check_model_mesh(mesh, model)


def check_model_mesh(mesh: Mesh | AbstractMesh, model: ModelConfig) -> None:
    """Refuses a model that cannot be sharded evenly over the mesh.

    Raises:
        InputError: heads or channels are not divisible by the number of devices they are sharded over.
    """
    size = mesh.shape
    shards = size["tensor"] * size["context"]
    for mixer in model.pattern:
        what, count = mixer.sharded
        if count % shards:
            raise InputError(
                f"the {count} {what} of {mixer.name} are not divisible by mesh.tensor x mesh.context = "
                f"{size['tensor']} x {size['context']}: change `mesh`"
            )


def parameter_spec(model: ModelConfig, path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of a parameter of the model, by the rules of `tttlm.model.sharding` and of its mixers.

    Parameters are sharded over `tensor` in use, over `fsdp` in storage, and over `context` in storage or, within a
    mixer, in use.

    If `tensor` does not divide its dimension, the dimension is not sharded over it; `fsdp` and `context`, if only used
    for storage, are assigned to the largest dimension that they divide. Vectors are not sharded over them: gathering a
    vector costs more than sharding saves.
    """
    first = 1 if STACKED.search(path) else 0
    rule = parameter_axes(model, path, len(shape) - first)
    sizes = list(shape)  # of the shard of a device
    spec: list[tuple[str, ...]] = [()] * len(shape)

    def shard(dimension: int, axis: str) -> bool:
        if sizes[dimension] % mesh.shape[axis]:
            return False
        sizes[dimension] //= mesh.shape[axis]
        spec[dimension] += (axis,)
        return True

    for dimension, axes in zip(range(first, len(shape)), rule, strict=False):
        for axis in axes.split():
            if mesh.shape[axis] == 1 or (axis in STORAGE and len(shape) - first == 1):
                continue
            if not shard(dimension, axis) and axis in STORAGE:
                any(shard(other, axis) for other in sorted(range(first, len(shape)), key=lambda n: -sizes[n]))
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))


def tree_shardings(model: ModelConfig, tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a training state; the optimiser state is sharded as its parameter is.

    The paths of Adam's state end with the parameter's path, so the same rules match them.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(model, path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of `[B, T]`: examples over data and fsdp, tokens over context."""
    return NamedSharding(mesh, P(BATCH, "context"))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `blocks/mixer/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): a batch is read in `count` shards of equally many examples, shard `index` by this process.

    Processes whose devices hold the same examples, each a part of the model or of the sequence, read the same shard.

    Raises:
        InputError: the examples that two processes hold are the same in part only.
    """
    held = _batch_blocks(mesh)
    shards = sorted(set(held.values()))
    if len({len(shard) for shard in shards}) > 1 or sum(map(len, shards)) != len(set().union(*shards)):
        raise InputError(
            f"mesh.tensor x mesh.context = {mesh.shape['tensor'] * mesh.shape['context']} devices hold the same "
            "examples but are split unevenly over the processes: let it divide, or be a multiple of, the devices of a "
            "process"
        )
    return shards.index(held[jax.process_index()]), len(shards)


def _batch_blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """The blocks of examples (data and fsdp divide a batch into them) that each process holds."""
    blocks: dict[int, set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices):
        blocks.setdefault(device.process_index, set()).add(index[0] * mesh.shape["fsdp"] + index[1])
    return {process: tuple(sorted(held)) for process, held in blocks.items()}


def place_batch(mesh: Mesh) -> Callable[[Batch[np.ndarray]], Batch[jax.Array]]:
    """A function that puts this process's shard of a batch (see `batch_shard`) onto its devices of the mesh."""
    sharding = batch_sharding(mesh)
    mine, blocks = _batch_blocks(mesh)[jax.process_index()], mesh.shape["data"] * mesh.shape["fsdp"]

    def place(array: np.ndarray) -> jax.Array:
        size = len(array) // len(mine)

        def part(index: Any) -> np.ndarray:
            start = mine.index((index[0].start or 0) // size) * size
            return array[start : start + size, *index[1:]]

        by_rank = NamedSharding(mesh, P(*sharding.spec[: array.ndim]))  # `continues` has no tokens
        return jax.make_array_from_callback((blocks * size, *array.shape[1:]), by_rank, part)

    return lambda batch: jax.tree.map(place, batch)
