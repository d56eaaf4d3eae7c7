"""The layout "packed": complete documents packed into examples, each starting on a mini-batch boundary.

Every token of a document is a target exactly once. A document longer than an example fills examples by itself; its
remainder is packed like a short document. Examples are filled by best fit, longest first: lengths counted in
mini-batches are few and small numbers, so documents of equal length are packed together and a million takes about a
second.
"""

from collections.abc import Sequence

import numpy as np

from tttlm.data.batch import Batch
from tttlm.data.store import Documents


class Packed:
    """Examples of packed documents.

    Args:
        documents: the documents of a split.
        length: tokens of an example, T.
        align: mini-batch size, a divisor of T.
        seed: seed of the order among documents of equal length.
    """

    def __init__(self, documents: Documents, length: int, align: int, seed: int) -> None:
        self._documents, self._length, self._align = documents, length, align
        self._full = np.cumsum(documents.positions // length)  # examples filled by one document, cumulative
        rest = documents.positions % length
        short = np.flatnonzero(rest)
        rng = np.random.default_rng(seed)
        short = short[rng.permutation(len(short))]
        bins, starts, count = best_fit(-(-rest[short] // align), length // align)
        order = np.lexsort((starts, bins))
        self._short, self._starts = short[order], starts[order] * align
        self._bounds = np.searchsorted(bins[order], np.arange(count + 1))

    def __len__(self) -> int:
        return self._full_examples + len(self._bounds) - 1

    @property
    def _full_examples(self) -> int:
        return int(self._full[-1]) if len(self._full) else 0

    @property
    def fill(self) -> float:
        """Fraction of positions that hold a token."""
        return float(self._documents.positions.sum()) / (len(self) * self._length)

    def take(self, indices: Sequence[int]) -> Batch[np.ndarray]:
        """Reads examples as a batch without `continues`; every array is 0 where there is no token."""
        shape = (len(indices), self._length)
        inputs, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        for i, index in enumerate(indices):
            for segment, (document, begin, start) in enumerate(self._pieces(index), start=1):
                stop = min(begin + self._length, int(self._documents.positions[document]))
                here = slice(start, start + stop - begin)
                inputs[i, here], targets[i, here] = self._documents.pairs(document, begin, stop)
                segment_ids[i, here] = segment
        return Batch(inputs, targets, segment_ids, (segment_ids > 0).astype(np.float32))

    def _pieces(self, example: int) -> list[tuple[int, int, int]]:
        """(document, offset in the document, offset in the example) of every piece in an example."""
        if example < self._full_examples:
            document = int(np.searchsorted(self._full, example, side="right"))
            before = int(self._full[document - 1]) if document else 0
            return [(document, (example - before) * self._length, 0)]
        here = slice(*self._bounds[example - self._full_examples : example - self._full_examples + 2])
        return [
            (int(d), int(self._documents.positions[d]) // self._length * self._length, int(start))
            for d, start in zip(self._short[here], self._starts[here], strict=True)
        ]


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Packs items into bins by best fit, largest first.

    Args:
        sizes: sizes of the items, int [n], from 1 to `capacity`.
        capacity: capacity of a bin.

    Returns:
        The bin of each item int [n], its offset in the bin int [n], and the number of bins.
    """
    bins, starts = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    stops = np.searchsorted(-sizes[order], -np.arange(capacity + 1), side="right")  # items of at least that size
    room: list[np.ndarray] = [np.empty(0, np.int64) for _ in range(capacity + 1)]  # bins by their free space
    count = 0
    for size in range(capacity, 0, -1):
        left = order[stops[size + 1] if size < capacity else 0 : stops[size]]
        for free in range(size, capacity + 1):
            if not len(left):
                break
            each = free // size
            if free == capacity:  # no open bin has enough space: new ones
                open_bins = np.arange(count, count + -(-len(left) // each))
                count += len(open_bins)
            else:
                open_bins, room[free] = np.split(room[free], [min(len(room[free]), -(-len(left) // each))])
            if not len(open_bins):
                continue
            taken = min(len(left), len(open_bins) * each)
            item, left = left[:taken], left[taken:]
            bins[item] = np.repeat(open_bins, each)[:taken]
            starts[item] = capacity - free + np.tile(np.arange(each), len(open_bins))[:taken] * size
            last = taken - (len(open_bins) - 1) * each  # items in the last of these bins
            room[free - each * size] = np.concatenate([room[free - each * size], open_bins[:-1]])
            room[free - last * size] = np.concatenate([room[free - last * size], open_bins[-1:]])
    return bins, starts, count
