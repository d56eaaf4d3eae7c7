"""Maximum mean discrepancy with Gaussian kernels: unbiased with a permutation test, and in linear time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tttlm.errors import InputError
from tttlm.shift.distances import column_blocks, row_blocks, scan_columns
from tttlm.shift.estimate import Estimate, normal_interval, one_sided_p
from tttlm.shift.samples import Features, centred, pair_of

_MEDIAN_OF = 2000


def median_bandwidth(a: Any, b: Any, *, features: Features | None = None, seed: int = 0) -> float:
    """The median distance between two samples of the union of A and B, computed on at most 2,000 of them.

    Raises:
        InputError: the samples are all equal, or not finite arrays with equally many features.
    """
    a, b = centred(*pair_of(a, b, features, 1))
    return _median_bandwidth(np.concatenate([a, b]), seed)


def _median_bandwidth(pooled: np.ndarray, seed: int) -> float:
    if len(pooled) > _MEDIAN_OF:
        pooled = pooled[np.random.default_rng(seed).choice(len(pooled), _MEDIAN_OF, replace=False)]
    squares = np.asarray(_all_squares(pooled))[np.triu_indices(len(pooled), 1)]
    bandwidth = float(np.sqrt(np.median(squares)))
    if bandwidth == 0:  # more than half of the pairs are equal
        bandwidth = float(np.sqrt(np.mean(squares)))
    if not bandwidth > 0:
        raise InputError("all samples of A and B are the same; there is no distance to set the kernel's bandwidth by")
    return bandwidth


@jax.jit
def _all_squares(x: jax.Array) -> jax.Array:
    step = lambda carry, squares, columns, real, _: squares
    return scan_columns(x, x[None], len(x), step, jnp.zeros((len(x), len(x)), x.dtype))


def mmd(
    a: Any,
    b: Any,
    *,
    bandwidths: float | Sequence[float] | None = None,
    permutations: int = 199,
    features: Features | None = None,
    seed: int = 0,
) -> Estimate:
    """Squared maximum mean discrepancy, unbiased, and the p-value of its permutation test (Gretton et al. 2012, eq. 3).

    `MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean k(a_i, b_j)` with
    `k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))`; it is 0 on average without shift and can be negative. All
    permutations are computed in one pass over blocks of the kernel matrix. They exchange samples between A and B, and
    the p-value is `(1 + number of permutations that reach the value) / (1 + permutations)`, which is exact.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        bandwidths: bandwidths of the kernel, in units of the features; several give the mean of their kernels. None
            takes the median distance between samples.
        permutations: number of permutations; the smallest p-value is `1 / (1 + permutations)`; 0 skips the test.
        features: a model's features of a batch of inputs.
        seed: seed of the permutations.

    Raises:
        InputError: fewer than two samples, bandwidths that are not positive, or features that are not finite arrays.
    """
    a, b = centred(*pair_of(a, b, features, 2))
    n, m, pooled = len(a), len(b), np.concatenate([a, b])
    kernel_bandwidths = _checked_bandwidths(bandwidths, pooled, seed)
    rng = np.random.default_rng(seed)
    in_a = np.zeros((permutations + 1, n + m), pooled.dtype)
    in_a[:, :n] = 1
    in_a[1:] = rng.permuted(in_a[1:], axis=1)
    in_a = np.ascontiguousarray(in_a.T)  # [N + M, permutations + 1], first the observed samples
    # Subtracting a constant from all off-diagonal values changes nothing, and keeps the summands small.
    median = _median_bandwidth(pooled, seed) if bandwidths is not None else kernel_bandwidths[0]
    offset = float(np.mean(np.exp(-0.5 * (median / kernel_bandwidths) ** 2)))
    columns, beside = column_blocks(pooled), column_blocks(in_a)
    within_a, of_rows = np.zeros(permutations + 1), np.zeros(n + m)  # of_rows: sums of the rows of the kernel matrix
    for rows, block in row_blocks(pooled):
        found = _kernel_sums(block, rows.start, columns, beside, kernel_bandwidths, offset, length=n + m)
        chosen, after, before = (np.asarray(sums).astype(np.float64) for sums in found)
        size = rows.stop - rows.start
        within_a += 2 * np.sum(in_a[rows] * chosen[:size], 0)
        of_rows[rows] += after[:size]
        of_rows += before.reshape(-1)[: n + m]
    total, between = of_rows.sum(), of_rows @ in_a - within_a
    within_b = total - 2 * between - within_a
    values = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)
    if not permutations:
        return Estimate(float(values[0]))
    rounding = 1e-6 * np.abs(values).max()  # a permutation that changes nothing must count as reaching the value
    reached = int(np.count_nonzero(values[1:] >= values[0] - rounding))
    return Estimate(float(values[0]), p_value=(1 + reached) / (1 + permutations))


def _checked_bandwidths(bandwidths: float | Sequence[float] | None, pooled: np.ndarray, seed: int) -> np.ndarray:
    if bandwidths is None:
        bandwidths = _median_bandwidth(pooled, seed)
    found = np.atleast_1d(np.asarray(bandwidths, pooled.dtype))
    if found.ndim != 1 or not found.size or not (found > 0).all():
        raise InputError(f"bandwidths of the kernel are positive numbers, got {bandwidths}")
    return found


def _kernel(squares: jax.Array, bandwidths: jax.Array) -> jax.Array:
    """Mean over the bandwidths of the Gaussian kernels of squared distances."""
    total = jnp.zeros_like(squares)
    for i in range(len(bandwidths)):
        total += jnp.exp(-0.5 * squares / bandwidths[i] ** 2)
    return total / len(bandwidths)


@partial(jax.jit, static_argnames=("length",))
def _kernel_sums(
    x: jax.Array, first: int, y: jax.Array, beside: jax.Array, bandwidths: jax.Array, offset: float, *, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block of rows of the kernel matrix minus `offset`, of which only the part above the diagonal is computed:
    its product with `beside` `[R, P]`, the sums of its rows `[R]`, and those of its columns `[J, C]`."""
    rows = first + jnp.arange(len(x))
    size = y.shape[1]

    def step(sums, squares, columns, real, j):
        kernel = jnp.where(
            real & (columns > rows[:, None]) & (rows < length)[:, None], _kernel(squares, bandwidths) - offset, 0
        )
        products = jnp.matmul(kernel, beside[j], precision=jax.lax.Precision.HIGHEST)
        return sums[0] + products, sums[1] + jnp.sum(kernel, 1), sums[2].at[j].set(jnp.sum(kernel, 0))

    start = jnp.zeros((len(x), beside.shape[-1]), x.dtype), jnp.zeros(len(x), x.dtype), jnp.zeros(y.shape[:2], x.dtype)
    return scan_columns(x, y, length, step, start, first // size)


def linear_time_mmd(
    a: Any,
    b: Any,
    *,
    bandwidths: float | Sequence[float] | None = None,
    features: Features | None = None,
    seed: int = 0,
) -> Estimate:
    """Squared maximum mean discrepancy in linear time, with an interval and a p-value (Gretton et al. 2012, lemma 14).

    It is the mean over disjoint pairs of `k(a, a') + k(b, b') - k(a, b') - k(a', b)`, so its distribution is normal for
    many samples; it needs far more samples than `mmd` to detect the same shift. Surplus samples of the larger sample
    are not used.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        bandwidths: bandwidths of the kernel, in units of the features; several give the mean of their kernels. None
            takes the median distance between samples.
        features: a model's features of a batch of inputs.
        seed: seed of the pairs.

    Raises:
        InputError: fewer than four samples, bandwidths that are not positive, or features that are not finite arrays.
    """
    a, b = centred(*pair_of(a, b, features, 4))
    kernel_bandwidths = _checked_bandwidths(bandwidths, np.concatenate([a, b]), seed)
    rng, pairs = np.random.default_rng(seed), min(len(a), len(b)) // 2
    a, b = (x[rng.permutation(len(x))[: 2 * pairs]] for x in (a, b))
    terms = np.asarray(_pair_terms(a[::2], a[1::2], b[::2], b[1::2], kernel_bandwidths)).astype(np.float64)
    value, error = terms.mean(), terms.std(ddof=1) / np.sqrt(pairs)
    return normal_interval(value, error, one_sided_p(value / error) if error > 0 else 1.0)


@jax.jit
def _pair_terms(a: jax.Array, a2: jax.Array, b: jax.Array, b2: jax.Array, bandwidths: jax.Array) -> jax.Array:
    kernel = lambda x, y: _kernel(jnp.sum((x - y) ** 2, 1), bandwidths)
    return kernel(a, a2) + kernel(b, b2) - kernel(a, b2) - kernel(a2, b)
