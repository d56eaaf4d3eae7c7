"""Means and covariances of a sample in groups: of all groups, and of all but one at little extra cost."""

from dataclasses import dataclass

import numpy as np

from tttlm.errors import InputError
from tttlm.shift.estimate import GROUPS, split_into_groups

_BLOCK = 8192


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]`, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    def cholesky(self) -> np.ndarray:
        """The lower factor of the covariance.

        Raises:
            InputError: the covariance is singular.
        """
        try:
            factor = np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:
            factor = np.zeros((1, 1))
        smallest = np.diag(factor).min()
        if smallest**2 <= 1e-12 * np.diag(self.covariance).max():
            raise InputError(
                f"the covariance of {len(self.mean)} features is singular; give more samples than features, "
                "remove constant features, or set `shrinkage`"
            )
        return factor


class Moments:
    """First and second moments of groups of a sample `[N, D]`, in float64.

    Args:
        groups: number of random groups; a small sample has at most one group per sample.
        shrinkage: the covariance becomes `(1 - shrinkage) S + shrinkage trace(S)/D I`.
    """

    def __init__(self, x: np.ndarray, seed: int, *, groups: int = GROUPS, shrinkage: float = 0.0):
        self.shrinkage = shrinkage
        self.shift = x.mean(0, dtype=np.float64)
        parts = split_into_groups(len(x), min(groups, len(x)), np.random.default_rng(seed))
        self.counts = np.array([len(part) for part in parts])
        self.sums, self.products = (
            np.stack(moments) for moments in zip(*(_sums(x, part, self.shift) for part in parts), strict=True)
        )

    def __len__(self) -> int:
        return len(self.counts)

    def gaussian(self, chosen: np.ndarray | slice = slice(None)) -> Gaussian:
        """Mean and unbiased covariance of the chosen groups; all of them by default."""
        count = self.counts[chosen].sum()
        mean = self.sums[chosen].sum(0) / count
        covariance = (self.products[chosen].sum(0) - count * np.outer(mean, mean)) / (count - 1)
        if self.shrinkage:
            scale = np.trace(covariance) / len(covariance)
            covariance = (1 - self.shrinkage) * covariance + self.shrinkage * scale * np.eye(len(covariance))
        return Gaussian(mean + self.shift, covariance)

    def without(self, group: int) -> Gaussian:
        """Mean and covariance of all groups but one."""
        return self.gaussian(np.arange(len(self)) != group)


def _sums(x: np.ndarray, part: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of outer products of the rows `part` of `x` minus `shift`."""
    first, second = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(part), _BLOCK):
        block = x[part[start : start + _BLOCK]] - shift
        first += block.sum(0)
        second += block.T @ block
    return first, second
