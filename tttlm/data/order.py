"""The order of examples: sources mixed by weight, each reshuffled every epoch, with random access to any position."""

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_PERIOD = 4_096  # period of a mixture's pattern in examples; weights are accurate to one part in this many


class Order:
    """The endless order of examples over one or several sources.

    Args:
        sizes: number of examples of each source.
        weights: weight of each source; they need not sum to 1.
        seed: seed of the shuffling.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, split: str = "train") -> None:
        self._sizes = list(sizes)
        self._seed = f"{split} {seed}"
        counts = proportional_counts(weights, _PERIOD)
        # Each source's examples are spread evenly over the period.
        when = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((sources, when))
        self._source = sources[order]
        self._rank = np.concatenate([np.arange(count) for count in counts])[order]
        self._counts = counts

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Returns (source, example of the source) at a position in the order."""
        period, position = divmod(number, _PERIOD)
        source = int(self._source[position])
        epoch, index = divmod(period * int(self._counts[source]) + int(self._rank[position]), self._sizes[source])
        return source, shuffled(index, self._sizes[source], f"{self._seed} {source} {epoch}")


def proportional_counts(weights: Sequence[float], total: int) -> np.ndarray:
    """Returns positive integers in proportion to weights that sum to `total` (largest remainders)."""
    relative = np.asarray(weights, float) / np.max(weights)  # the largest floats would overflow in the sum
    exact = relative / relative.sum() * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while (missing := total - int(counts.sum())) != 0:
        i = int(np.argmax(exact - counts) if missing > 0 else np.argmax(np.where(counts > 1, counts - exact, -np.inf)))
        counts[i] += 1 if missing > 0 else -1
    return counts


def shuffled(index: int, size: int, seed: str) -> int:
    """Maps `index` by a seeded permutation of `range(size)`, without storing the permutation.

    A Feistel network permutes the next power of four; a result outside `size` is permuted again until it is inside.
    (grain's `index_shuffle` does the same over at least 2^16 positions, which takes milliseconds for few examples.)
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(seed)
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=256)
def _round_keys(seed: str) -> tuple[int, ...]:
    return struct.unpack("<6Q", hashlib.blake2b(seed.encode(), digest_size=48).digest())


def _mixed(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input affects every bit of the output."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
