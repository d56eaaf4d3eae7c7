"""Distances between all pairs of two samples, block by block, without the full matrix `[N, M]` in memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROWS, COLUMNS = 1024, 4096
Step = Callable[[Any, jax.Array, jax.Array, jax.Array, Any], Any]


def row_blocks(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks `[R, D]` of the rows of `x`, the last one padded with zeros, each with the slice of its rows."""
    size = min(ROWS, len(x))
    for start in range(0, len(x), size):
        block = x[start : start + size]
        yield slice(start, start + len(block)), np.pad(block, ((0, size - len(block)), (0, 0)))


def column_blocks(y: np.ndarray) -> jax.Array:
    """`[M, D]` as blocks `[J, C, D]` on the device, the last one padded with zeros."""
    size = min(COLUMNS, len(y))
    count = -(-len(y) // size)
    return jnp.asarray(np.pad(y, ((0, count * size - len(y)), (0, 0))).reshape(count, size, y.shape[1]))


def scan_columns(x: jax.Array, y: jax.Array, length: int, step: Step, start: Any, first: Any = 0) -> Any:
    """Runs `step(carry, squares, columns, real, j)` over the blocks of `y`, from block `first` on.

    Args:
        x: block of rows `[R, D]`.
        y: blocks `[J, C, D]` of `length` columns.
        step: gets the squared distances `[R, C]`, the indices `[C]` of the columns, a mask `[C]` that is False for
            padding, and the index of the block.
    """
    size = y.shape[1]
    x_squares = jnp.sum(x * x, 1)

    def body(j, carry):
        block = y[j]
        products = jnp.matmul(x, block.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.maximum(x_squares[:, None] + jnp.sum(block * block, 1) - 2 * products, 0)
        columns = j * size + jnp.arange(size)
        return step(carry, squares, columns, columns < length, j)

    return jax.lax.fori_loop(first, y.shape[0], body, start)


@partial(jax.jit, static_argnames=("length", "k", "same"))
def _nearest(
    x: jax.Array, radius: jax.Array, first: int, y: jax.Array, *, length: int, k: int, same: bool
) -> tuple[jax.Array, jax.Array]:
    rows = first + jnp.arange(len(x))

    def step(best, squares, columns, real, _):
        usable = real & (columns != rows[:, None]) if same else real[None, :]
        values, places = jax.lax.top_k(jnp.where(usable, -squares, -jnp.inf), min(k, len(columns)))
        values = jnp.concatenate([best[0], values], 1)
        indices = jnp.concatenate([best[1], columns[places].astype(jnp.int32)], 1)
        values, places = jax.lax.top_k(values, k)
        within = jnp.sum(usable & (squares < radius[:, None] ** 2), 1, dtype=jnp.int32)
        return values, jnp.take_along_axis(indices, places, 1), best[2] + within

    nothing = jnp.full((len(x), k), -jnp.inf, x.dtype), jnp.zeros((len(x), k), jnp.int32), jnp.zeros(len(x), jnp.int32)
    _, indices, within = scan_columns(x, y, length, step, nothing)
    # The squares above are differences of large numbers; the few nearest are recomputed from the points.
    differences = x[:, None] - y.reshape(-1, y.shape[-1])[indices]
    return jnp.sort(jnp.sqrt(jnp.sum(differences**2, -1)), 1), within


def nearest(
    x: np.ndarray, y: np.ndarray, k: int, *, same: bool = False, radius: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances `[N, k]` from every row of `x` to its `k` nearest rows of `y`, ascending, and how many rows of `y` are
    closer to it than its `radius` `[N]`; int `[N]`, zero without a radius.

    Args:
        same: whether `y` is `x`, so that a row is not a neighbour of itself.
    """
    distances, within = np.empty((len(x), k), x.dtype), np.empty(len(x), np.int64)
    radii = np.zeros(len(x), x.dtype) if radius is None else radius.astype(x.dtype)
    columns = column_blocks(y)
    for rows, block in row_blocks(x):
        of_rows = np.pad(radii[rows], (0, len(block) - (rows.stop - rows.start)))
        found = _nearest(block, of_rows, rows.start, columns, length=len(y), k=k, same=same)
        distances[rows], within[rows] = (np.asarray(array)[: rows.stop - rows.start] for array in found)
    return distances, within
