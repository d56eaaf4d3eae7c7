"""Which row comes when: sources mixed by weight, each reshuffled every epoch, any position found in constant time."""

import hashlib
from collections.abc import Sequence

import numpy as np

_PERIOD = 4_096  # rows after which a mixture's pattern repeats; weights are met to one part in this many


class Order:
    """The endless order of rows over one or several sources.

    Args:
        sizes: rows of each source.
        weights: share of each source among the rows; need not sum to 1.
        seed: of the shuffling.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, split: str = "train") -> None:
        self._sizes = list(sizes)
        self._seed = f"{split} {seed}"
        counts = shares(weights, _PERIOD)
        # Each source's rows are spread evenly over the period.
        when = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((sources, when))
        self._source = sources[order]
        self._rank = np.concatenate([np.arange(count) for count in counts])[order]
        self._counts = counts

    def __getitem__(self, row: int) -> tuple[int, int]:
        """(source, row of the source) at a place in the order."""
        period, place = divmod(row, _PERIOD)
        source = int(self._source[place])
        epoch, index = divmod(period * int(self._counts[source]) + int(self._rank[place]), self._sizes[source])
        return source, shuffled(index, self._sizes[source], f"{self._seed} {source} {epoch}")


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to weights that sum to `total`, none of them 0 (largest remainders)."""
    exact = np.asarray(weights, float) / np.sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while (missing := total - int(counts.sum())) != 0:
        i = int(np.argmax(exact - counts) if missing > 0 else np.argmax(np.where(counts > 1, counts - exact, -np.inf)))
        counts[i] += 1 if missing > 0 else -1
    return counts


def shuffled(index: int, size: int, seed: str) -> int:
    """Where a seeded permutation of `range(size)` takes `index`; nothing is stored."""
    from grain.experimental import index_shuffle

    return index_shuffle(index, max_index=size - 1, seed=_number(seed), rounds=4)


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
