"""The layout "documents": each row of the batch reads one document after another, T tokens a step.

For evaluation, and for training with carried state. `continues` [B] says of each example whether its first token goes
on with the document that the example at the same position of the previous step ended in; where it is False, the state
carried there is to be reset before the step. No example holds tokens of two documents: a document's last step is padded
at its end. `segment_ids` also number the documents that one position of the batch reads, 1, 2, ..., and 0 is padding.
A position that has read all its documents of the epoch before the others gets steps of padding alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heapreplace

import numpy as np

from tttlm.data.order import proportional_counts
from tttlm.data.store import Documents


class Lanes:
    """Documents of one source shared out to rows, as evenly as their lengths allow.

    Args:
        documents: the documents of a split.
        length: tokens of a step, T.
        lanes: rows they are shared out to.
        seed: of the order within a row, which changes every epoch; None keeps the order of the source.
    """

    def __init__(self, documents: Documents, length: int, lanes: int, seed: int | None) -> None:
        self._documents, self._length, self._seed = documents, length, seed
        steps = -(-documents.positions // length)
        self._lanes: list[list[int]] = [[] for _ in range(lanes)]
        load = [(0, lane) for lane in range(lanes)]
        heapify(load)
        for document in np.argsort(-steps, kind="stable"):
            if steps[document]:
                taken, lane = load[0]
                self._lanes[lane].append(int(document))
                heapreplace(load, (taken + int(steps[document]), lane))
        self._steps = steps
        self.steps_per_epoch = max(taken for taken, _ in load)
        self._epoch = lru_cache(maxsize=2 * lanes)(self._epoch_of)

    def _epoch_of(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a lane in an epoch's order, and at which step each ends."""
        documents = np.array(sorted(self._lanes[lane]), np.int64)
        if self._seed is not None:
            documents = np.random.default_rng((self._seed, lane, epoch)).permutation(documents)
        return documents, np.cumsum(self._steps[documents])

    def fill(self, lane: int, step: int, row: dict[str, np.ndarray]) -> None:
        """Writes what a lane reads at a step into zeroed arrays, [T] and for `continues` []."""
        epoch, step = divmod(step, self.steps_per_epoch)
        documents, ends = self._epoch(lane, epoch)
        place = int(np.searchsorted(ends, step, side="right"))
        if place == len(documents):
            return  # this lane waits for the longest one
        document = int(documents[place])
        begin = (step - (int(ends[place - 1]) if place else 0)) * self._length
        stop = min(begin + self._length, int(self._documents.positions[document]))
        here = slice(0, stop - begin)
        row["inputs"][here], row["targets"][here] = self._documents.pairs(document, begin, stop)
        row["continues"][...] = begin > 0
        row["segment_ids"][here] = epoch * len(documents) + place + 1  # never that of the document before
        row["weights"][here] = 1.0


class LaneBatches:
    """Batches of one or several sources, each with its share of the rows by weight.

    Attributes:
        longest: tokens of the longest document.
    """

    def __init__(
        self, sources: Sequence[Documents], weights: Sequence[float], length: int, rows: int, seed: int | None
    ) -> None:
        counts = proportional_counts(weights, rows)
        self._length = length
        self._sources = [
            Lanes(documents, length, int(count), None if seed is None else seed + i)
            for i, (documents, count) in enumerate(zip(sources, counts, strict=True))
        ]
        self._lanes = [(lanes, i) for lanes, count in zip(self._sources, counts, strict=True) for i in range(count)]
        self.steps_per_epoch = max(lanes.steps_per_epoch for lanes in self._sources)
        self.longest = max(int(source.positions.max()) for source in sources)

    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        shape = (len(rows), self._length)
        names = ("inputs", "targets", "segment_ids")
        batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        batch["continues"] = np.zeros(len(rows), np.bool_)
        for i, row in enumerate(rows):
            lanes, lane = self._lanes[row]
            lanes.fill(lane, step, {name: array[i, ...] for name, array in batch.items()})
        return batch
