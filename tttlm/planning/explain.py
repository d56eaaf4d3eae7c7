"""The sharding of every array of a training state, as a table; nothing is computed and no data is read."""

import math
from collections.abc import Iterator

import jax

from tttlm.training.config import TrainConfig, check
from tttlm.training.devices import GIB
from tttlm.training.sharding import check_mesh, imagined_mesh, path_name
from tttlm.training.step import Model, TrainState, abstract_state

Row = tuple[str, str, str, str, str]
HEAD: Row = ("path", "shape", "dtype", "sharded over", "bytes a device")


def explain(config: TrainConfig) -> list[str]:
    """The lines to print: one for every array of the state, then the totals per device.

    The mesh may have more devices than this machine if `mesh` gives the size of every axis.

    Raises:
        InputError: the configuration or the mesh cannot be used.
    """
    check(config)
    mesh = imagined_mesh(config.mesh)
    check_mesh(mesh, config)
    state = abstract_state(config, Model(config.model), mesh)
    rows = [HEAD, *_rows(state)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}; {mesh.size:,} devices", ""]
    for *cells, size in rows:
        lines.append(
            "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), size.rjust(15)])
        )
    lines.append("")
    for name, part in (("parameters", state.params), ("optimiser state", state.opt_state), ("all", state)):
        total, here = (sum(f(x) for x in jax.tree.leaves(part)) for f in (_total_bytes, _bytes))
        lines.append(f"{name:16}{here / GIB:8.3f} GiB a device, {total / GIB:8.3f} GiB in all")
    return lines


def _rows(state: TrainState) -> Iterator[Row]:
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        axes = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
        spec = ", ".join("-" if a is None else a if isinstance(a, str) else "*".join(a) for a in axes)
        sharded = spec if any(axes) else "replicated"
        yield path_name(path), " x ".join(map(str, x.shape)) or "scalar", x.dtype.name, sharded, f"{_bytes(x):,}"


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _total_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
