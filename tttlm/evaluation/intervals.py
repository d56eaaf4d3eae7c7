"""Confidence intervals by bootstrap over documents."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Means of bins, `[bins]` each; `low` and `high` are None for a single document. NaN where there are no tokens."""

    mean: Float[np.ndarray, "bins"]
    low: Float[np.ndarray, "bins"] | None
    high: Float[np.ndarray, "bins"] | None


def bootstrap(
    nats: Float[np.ndarray, "documents bins"],
    tokens: Float[np.ndarray, "documents bins"],
    *,
    resamples: int,
    seed: int,
    against: Float[np.ndarray, "documents bins"] | None = None,
) -> Interval:
    """Nats per token of every bin with its interval (percentile bootstrap, 95%), documents drawn with replacement.

    Args:
        nats: Summed losses of each document.
        tokens: Numbers of tokens of each document.
        resamples: Number of resamples.
        seed: Seed of the draws.
        against: Losses of another model at the same tokens; the interval is of the difference, document by document.
    """
    nats = nats if against is None else nats - against
    count = len(nats)

    def ratio(weights: Float[np.ndarray, "n documents"]) -> Float[np.ndarray, "n bins"]:
        total = weights @ tokens
        return np.where(total > 0, weights @ nats / np.where(total > 0, total, 1), np.nan)

    mean = ratio(np.ones((1, count)))[0]
    if count < 2:
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    with np.errstate(invalid="ignore"):
        found = ratio(drawn)
    known = ~np.isnan(mean)
    low, high = np.full((2, nats.shape[1]), np.nan)
    low[known], high[known] = np.nanquantile(found[:, known], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Interval(mean, low, high)
