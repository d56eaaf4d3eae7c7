"""Frechet distance between the Gaussians of two samples: FID, and the square of their Wasserstein distance."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tttlm.shift.estimate import GROUPS, Estimate, jackknife_error, t_interval
from tttlm.shift.moments import Gaussian, Moments
from tttlm.shift.samples import Features, pair_of

_HALVES = 2


@dataclass(frozen=True)
class FrechetEstimate(Estimate):
    """A Frechet distance with an estimate of its small-sample bias.

    Attributes:
        bias: estimate of the amount by which `value` is too large because of few samples; NaN if it cannot be
            estimated. `value - bias` estimates the distance for infinitely many samples.
    """

    bias: float = float("nan")


def squared_distance(a: Gaussian, b: Gaussian) -> float:
    """`|m_A - m_B|^2 + tr(S_A + S_B - 2 (S_A^1/2 S_B S_A^1/2)^1/2)` (Dowson and Landau 1982)."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))  # root root^T = S_A, which is enough for the trace
    middle = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    cross = np.sum(np.sqrt(np.maximum(middle, 0)))
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance(a: Any, b: Any, *, features: Features | None = None, seed: int = 0) -> FrechetEstimate:
    """Frechet distance of two samples of features; of Inception features it is FID (arXiv 1706.08500).

    The interval, by the delete-a-group jackknife, is around `value`, which is too large on average: the bias falls like
    one over the sample size and depends on the features, so that values of samples of different sizes cannot be
    compared (arXiv 1911.07023). `bias` estimates it from halves of the samples, whose bias is twice as large. With
    fewer samples than features this law does not hold and `bias` is too small.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        features: a model's features of a batch of inputs.
        seed: seed of the groups and halves.

    Raises:
        InputError: features that are not finite `[N, D]` arrays with the same `D`, or fewer than two samples.
    """
    a, b = pair_of(a, b, features, 2)
    of_a, of_b = Moments(a, seed), Moments(b, seed + 1)
    value = squared_distance(of_a.gaussian(), of_b.gaussian())
    groups = min(len(of_a), len(of_b))
    if groups < GROUPS or min(len(a), len(b)) < 4 * GROUPS:
        return FrechetEstimate(value)
    left_out = [squared_distance(of_a.without(g), of_b.without(g)) for g in range(groups)]
    rng = np.random.default_rng(seed)
    of_halves = []
    for _ in range(_HALVES):
        half_a, half_b = rng.permutation(groups), rng.permutation(groups)
        for side in (slice(0, groups // 2), slice(groups // 2, groups)):
            of_halves.append(squared_distance(of_a.gaussian(half_a[side]), of_b.gaussian(half_b[side])))
    interval = t_interval(value, float(jackknife_error(np.array(left_out))), groups - 1)
    return FrechetEstimate(value, interval.low, interval.high, bias=float(np.mean(of_halves)) - value)
