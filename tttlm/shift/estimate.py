"""The estimate of a measure, and its interval by jackknife, by disjoint parts, or by formula."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

CONFIDENCE = 0.95
GROUPS = 10


@dataclass(frozen=True)
class Estimate:
    """The estimate of one measure of shift.

    Attributes:
        value: the estimate itself.
        low, high: ends of a 95% confidence interval; None if the measure has a test instead.
        p_value: probability of an estimate at least this large if both samples come from one distribution; None if the
            measure has only an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def t_interval(
    value: float, standard_error: float, degrees_of_freedom: float, p_value: float | None = None
) -> Estimate:
    """The estimate with the interval of Student's t; no interval if the standard error is not finite."""
    if not np.isfinite(standard_error):
        return Estimate(float(value), p_value=p_value)
    half = special.stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2) * standard_error
    return Estimate(float(value), float(value - half), float(value + half), p_value)


def normal_interval(value: float, standard_error: float, p_value: float | None = None) -> Estimate:
    """The estimate with the interval of the normal distribution."""
    return t_interval(value, standard_error, np.inf, p_value)


def one_sided_p(z: float) -> float:
    """Probability that a standard normal exceeds `z`."""
    return float(special.ndtr(-z))


def split_into_groups(n: int, groups: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The indices `0..n-1` in random order, divided into groups of nearly equal size."""
    return np.array_split(rng.permutation(n), groups)


def jackknife_error(left_out: np.ndarray) -> np.ndarray:
    """Standard error from the estimates `[G, ...]` that leave out one of `G` groups of both samples each.

    This is the delete-a-group jackknife, `sqrt((G - 1) / G * sum_g (theta_g - mean)^2)`.
    """
    groups = len(left_out)
    return np.sqrt((groups - 1) * np.var(left_out, axis=0))


def apart_error(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray | float],
    a: np.ndarray,
    b: np.ndarray,
    smallest: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """Standard error and degrees of freedom from the statistic of disjoint parts of the samples.

    Both samples are divided at random into `G` parts. As the parts are independent and the variance of the statistic
    falls like one over the sample size, the standard deviation of its values on the parts, divided by `sqrt(G)`, is the
    standard error of the full statistic. For pairwise statistics this costs one `G`-th of the full statistic.

    Args:
        smallest: the least number of samples of a part; a small sample has fewer parts. With fewer than four parts the
            error is NaN.
    """
    groups = min(GROUPS, len(a) // smallest, len(b) // smallest)
    if groups < 4:
        return np.asarray(np.nan), 1
    rng = np.random.default_rng(seed)
    # Parts of one size, so that one compiled program serves them all.
    of_a = [index[: len(a) // groups] for index in split_into_groups(len(a), groups, rng)]
    of_b = [index[: len(b) // groups] for index in split_into_groups(len(b), groups, rng)]
    values = np.array([statistic(a[i], b[j]) for i, j in zip(of_a, of_b, strict=True)])
    return np.std(values, axis=0, ddof=1) / np.sqrt(groups), groups - 1
