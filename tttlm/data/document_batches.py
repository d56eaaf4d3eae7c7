"""The layout "documents": each index of the batch reads one document after another, T tokens per step.

It is for evaluation, and for training with carried state. `continues` [B] says whether an example continues the
document that the example at the same index ended in at the previous step; where it is False, the carried state must be
reset before the step. No example has tokens of two documents: a document's last step is padded at its end.
`segment_ids` number the documents that one index of the batch reads, 1, 2, ..., and 0 is padding. An index that has
read all its documents of the epoch before the others gets steps of padding only.
"""

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heapreplace

import numpy as np

from tttlm.data.batch import Batch
from tttlm.data.order import proportional_counts
from tttlm.data.store import Documents


class Streams:
    """Documents of one source distributed over streams, one per index of the batch, as evenly as their lengths allow.

    Args:
        documents: the documents of a split.
        length: tokens of an example, T.
        count: number of streams; each reads its documents one after another.
        seed: seed of the order within a stream, which changes every epoch; None keeps the order of the source.
    """

    def __init__(self, documents: Documents, length: int, count: int, seed: int | None) -> None:
        self._documents, self._length, self._seed = documents, length, seed
        steps = -(-documents.positions // length)
        self._streams: list[list[int]] = [[] for _ in range(count)]
        load = [(0, stream) for stream in range(count)]
        heapify(load)
        for document in np.argsort(-steps, kind="stable"):
            if steps[document]:
                taken, stream = load[0]
                self._streams[stream].append(int(document))
                heapreplace(load, (taken + int(steps[document]), stream))
        self._steps = steps
        self.steps_per_epoch = max(taken for taken, _ in load)
        self._epoch = lru_cache(maxsize=2 * count)(self._epoch_of)

    def _epoch_of(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a stream in an epoch's order, and the step at which each ends."""
        documents = np.array(sorted(self._streams[stream]), np.int64)
        if self._seed is not None:
            documents = np.random.default_rng((self._seed, stream, epoch)).permutation(documents)
        return documents, np.cumsum(self._steps[documents])

    def fill(self, stream: int, step: int, batch: Batch[np.ndarray], i: int) -> None:
        """Writes the example of a stream at a step into index i of a batch of zeros."""
        epoch, step = divmod(step, self.steps_per_epoch)
        documents, ends = self._epoch(stream, epoch)
        index = int(np.searchsorted(ends, step, side="right"))
        if index == len(documents):
            return  # this stream has ended and waits for the longest one
        document = int(documents[index])
        begin = (step - (int(ends[index - 1]) if index else 0)) * self._length
        stop = min(begin + self._length, int(self._documents.positions[document]))
        here = slice(0, stop - begin)
        assert batch.segment_ids is not None
        assert batch.weights is not None
        assert batch.continues is not None
        batch.inputs[i, here], batch.targets[i, here] = self._documents.pairs(document, begin, stop)
        batch.segment_ids[i, here] = epoch * len(documents) + index + 1  # differs from that of the previous document
        batch.weights[i, here] = 1.0
        batch.continues[i] = begin > 0


class DocumentBatches:
    """Batches of one or several sources, each with a number of streams in proportion to its weight.

    Args:
        sources: the documents of each source.
        weights: weights of the sources; they need not sum to 1.
        length: tokens of an example, T.
        batch_size: examples of a batch, at least as many as there are sources.
        seed: seed of the order of documents; None keeps that of the sources.

    Attributes:
        steps_per_epoch: steps after which every document was read.
        longest: tokens of the longest document.
    """

    def __init__(
        self, sources: Sequence[Documents], weights: Sequence[float], length: int, batch_size: int, seed: int | None
    ) -> None:
        counts = proportional_counts(weights, batch_size)
        self._length = length
        streams = [
            Streams(documents, length, int(count), None if seed is None else seed + i)
            for i, (documents, count) in enumerate(zip(sources, counts, strict=True))
        ]
        self._streams = [(source, i) for source, count in zip(streams, counts, strict=True) for i in range(count)]
        self.steps_per_epoch = max(source.steps_per_epoch for source in streams)
        self.longest = max(int(source.positions.max()) for source in sources)

    def batch(self, step: int, examples: range) -> Batch[np.ndarray]:
        """Reads the examples of these indices of the batch of a step."""
        shape = (len(examples), self._length)
        inputs, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        weights, continues = np.zeros(shape, np.float32), np.zeros(len(examples), np.bool_)
        batch = Batch(inputs, targets, segment_ids, weights, continues)
        for i, index in enumerate(examples):
            streams, stream = self._streams[index]
            streams.fill(stream, step, batch, i)
        return batch
