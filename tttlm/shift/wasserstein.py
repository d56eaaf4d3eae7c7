"""Wasserstein distances: exact in one dimension, sliced, entropic, and in closed form for Gaussians."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tttlm.errors import InputError
from tttlm.shift.estimate import Estimate, apart_error, t_interval
from tttlm.shift.frechet import frechet_distance
from tttlm.shift.samples import Features, centred, pair_of

_DIRECTIONS_AT_ONCE = 16


def wasserstein_1d(a: Any, b: Any, *, order: float = 1.0, features: Features | None = None, seed: int = 0) -> Estimate:
    """Exact Wasserstein distance between two samples of one feature, in its units.

    `W_p = (integral over u in (0, 1) of |F_A^-1(u) - F_B^-1(u)|^p du)^(1/p)`, for samples of any two sizes.

    Args:
        a, b: `[N]` and `[M]`, or `[N, 1]` and `[M, 1]`, or inputs for `features`.
        order: `p`, at least 1.
        features: a model's feature of a batch of inputs.
        seed: seed of the parts of the samples for the interval.

    Raises:
        InputError: more than one feature, or an order below 1.
    """
    a, b = pair_of(a, b, features, 1)
    _check_order(order)
    if a.shape[1] != 1:
        raise InputError(f"wasserstein_1d takes one feature, got {a.shape[1]}; sliced_wasserstein takes any number")
    value = columnwise_wasserstein(a, b, order)[0]
    error, degrees = apart_error(lambda x, y: columnwise_wasserstein(x, y, order)[0], a, b, 10, seed)
    return _not_negative(t_interval(value, float(error), degrees))


def columnwise_wasserstein(a: np.ndarray, b: np.ndarray, order: float = 1.0) -> np.ndarray:
    """Exact Wasserstein distance `[D]` of every single feature."""
    return np.concatenate(
        [
            np.asarray(_columns(a[:, i : i + _DIRECTIONS_AT_ONCE], b[:, i : i + _DIRECTIONS_AT_ONCE], order))
            for i in range(0, a.shape[1], _DIRECTIONS_AT_ONCE)
        ]
    )


def sliced_wasserstein(
    a: Any,
    b: Any,
    *,
    order: float = 2.0,
    directions: int = 128,
    features: Features | None = None,
    seed: int = 0,
) -> Estimate:
    """Sliced Wasserstein distance: the exact distance along random directions, averaged (Rabin et al. 2012).

    `SW_p = (mean over unit directions w of W_p(w^T A, w^T B)^p)^(1/p)`. A shift of all samples by a vector `c` has
    `SW_2 = |c| / sqrt(D)`. The value is biased upwards near zero. The interval covers the sampling of samples and of
    directions.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        order: `p`, at least 1.
        directions: number of directions, drawn uniformly.
        features: a model's features of a batch of inputs.
        seed: seed of the directions and of the parts of the samples for the interval.

    Raises:
        InputError: an order below 1, no direction, or features that are not finite arrays with equally many features.
    """
    a, b = centred(*pair_of(a, b, features, 1))
    _check_order(order)
    if directions < 1:
        raise InputError(f"directions must be at least 1, got {directions}")
    axes = np.random.default_rng(seed).standard_normal((a.shape[1], directions))
    axes = (axes / np.linalg.norm(axes, axis=0)).astype(a.dtype)

    def along_axes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [
                np.asarray(_projected(x, y, axes[:, i : i + _DIRECTIONS_AT_ONCE], order))
                for i in range(0, directions, _DIRECTIONS_AT_ONCE)
            ]
        )

    def mean(powers: np.ndarray) -> float:
        return float(np.mean(powers) ** (1 / order))

    powers = along_axes(a, b).astype(np.float64) ** order
    value = mean(powers)
    error, degrees = apart_error(lambda x, y: mean(along_axes(x, y).astype(np.float64) ** order), a, b, 10, seed)
    of_directions = 0.0
    if directions > 1 and value > 0:  # by the derivative of the power 1/p
        of_directions = np.std(powers, ddof=1) / np.sqrt(directions) * value / (order * np.mean(powers))
    return _not_negative(t_interval(value, float(np.hypot(error, of_directions)), degrees))


def gaussian_wasserstein(a: Any, b: Any, *, features: Features | None = None, seed: int = 0) -> Estimate:
    """Wasserstein distance of order 2 between the Gaussians with the samples' means and covariances.

    It is the root of the Frechet distance (see `frechet_distance`), in the units of the features.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        features: a model's features of a batch of inputs.
        seed: seed of the groups for the interval.

    Raises:
        InputError: features that are not finite `[N, D]` arrays with the same `D`, or fewer than two samples.
    """
    return root_of(frechet_distance(a, b, features=features, seed=seed))


def root_of(squared: Estimate) -> Estimate:
    """The estimate of a distance from the estimate of its square."""
    ends = [None if end is None else float(np.sqrt(max(end, 0))) for end in (squared.low, squared.high)]
    return Estimate(float(np.sqrt(squared.value)), *ends)


def entropic_wasserstein(
    a: Any,
    b: Any,
    *,
    epsilon: float | None = None,
    batch_size: int = 1024,
    features: Features | None = None,
    seed: int = 0,
) -> Estimate:
    """Root of the Sinkhorn divergence, the entropic transport cost without its bias (arXiv 1810.08278), by `ott-jax`.

    `S = OT(A, B) - OT(A, A) / 2 - OT(B, B) / 2` with the cost `|x - y|^2`; as epsilon falls to 0 its root becomes the
    Wasserstein distance of order 2, and as it grows the distance of the means. Time grows with the product of the
    sample sizes; memory does not, because the costs are recomputed in each iteration.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        epsilon: weight of the entropy, in squared units of the features; None takes a twentieth of the mean cost.
        batch_size: number of rows of the costs in memory at a time.
        features: a model's features of a batch of inputs.
        seed: seed of the parts of the samples for the interval.

    Raises:
        InputError: `ott-jax` is not installed, epsilon is not positive, or the iteration did not converge.
    """
    try:
        from tttlm.shift.transport import sinkhorn_divergence
    except ImportError:
        raise InputError("entropic Wasserstein distance needs ott-jax: pip install 'tttlm[shift]'") from None
    a, b = centred(*pair_of(a, b, features, 2))
    if epsilon is None:
        # The mean of |x - y|^2 over all pairs, from the moments alone.
        of_a, of_b = (np.mean(np.sum(np.square(x, dtype=np.float64), 1)) for x in (a, b))
        epsilon = 0.05 * float(of_a + of_b - 2 * a.mean(0, dtype=np.float64) @ b.mean(0, dtype=np.float64))
        epsilon = max(epsilon, 1e-12)
    if epsilon <= 0:
        raise InputError(f"epsilon must be positive, got {epsilon}")

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        value, converged = sinkhorn_divergence(x, y, epsilon, batch_size)
        return float(np.sqrt(max(float(value), 0.0))) if bool(converged) else np.nan

    value = distance(a, b)
    if np.isnan(value):
        raise InputError(f"Sinkhorn's iteration did not converge with epsilon {epsilon:.3g}; take a larger one")
    error, degrees = apart_error(distance, a, b, 20, seed)
    return _not_negative(t_interval(value, float(error), degrees))


def _check_order(order: float) -> None:
    if not order >= 1:
        raise InputError(f"the order of a Wasserstein distance must be at least 1, got {order}")


def _not_negative(estimate: Estimate) -> Estimate:
    """The estimate with its interval clipped at zero."""
    low = None if estimate.low is None else max(estimate.low, 0.0)
    return Estimate(estimate.value, low, estimate.high, estimate.p_value)


@jax.jit
def _projected(a: jax.Array, b: jax.Array, axes: jax.Array, order: float) -> jax.Array:
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return _columns(product(a, axes), product(b, axes), order)


@jax.jit
def _columns(a: jax.Array, b: jax.Array, order: float) -> jax.Array:
    n, m = len(a), len(b)
    # Both quantile functions are constant between these levels, which are integers in units of 1/(nm).
    levels = np.unique(np.concatenate([np.arange(n + 1, dtype=np.int64) * m, np.arange(1, m, dtype=np.int64) * n]))
    weights = jnp.asarray(np.diff(levels) / (n * m), a.dtype)
    gaps = jnp.abs(jnp.sort(a, 0)[levels[:-1] // m] - jnp.sort(b, 0)[levels[:-1] // n])
    scale = jnp.maximum(jnp.max(gaps, 0), jnp.finfo(a.dtype).tiny)  # keeps high orders in range
    return scale * (weights @ (gaps / scale) ** order) ** (1 / order)
