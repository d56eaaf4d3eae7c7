"""Loss, perplexity and bits per byte of text of any length, by streaming it through `extend`."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.model import LanguageModel
from tttlm.training.loss import token_losses

Chunk = tuple[np.ndarray, int]  # tokens of a document, and the bytes of text they stand for


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
        nats: the summed -log p of every token given all before it in its document.
        tokens: how many tokens were predicted.
        bytes: how many bytes of UTF-8 they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


def stream_score(
    model: LanguageModel,
    documents: Iterable[Iterable[Chunk]],
    *,
    rows: int = 8,
    chunk: int = 512,
    align: int = 1,
    on_progress: Callable[[int], Any] = lambda bytes_read: None,
) -> Score:
    """Scores documents in constant memory, however long they are.

    Each of `rows` rows reads one document after another; `segment_ids` tell the model where a new one starts, so
    every document is read as if it were alone. Attention over the whole past has its cache emptied there, so that it
    needs room for the longest document.

    Args:
        model: bound to its parameters.
        documents: each an iterable of (tokens, bytes they stand for), read as needed. The first token of a document
            is what it is entered from and is not predicted.
        rows: documents read side by side.
        chunk: tokens of a row in one call of `extend`; rounded up to a multiple of `align`.
        align: documents start at multiples of this many tokens: the inner mini-batch of a TTT model.
        on_progress: called with the number of bytes read since the last call.

    Raises:
        InputError: a document is longer than an attention cache has room for.
    """
    chunk = -(-chunk // align) * align
    graph, params = nnx.split(model)
    room = model.config.cache_length
    if room is not None:
        align = chunk  # documents start where a call does, which is where a cache can be emptied

    @jax.jit
    def extend(
        params: Any, state: Any, begins: np.ndarray, inputs: jax.Array, targets: jax.Array, segments: jax.Array
    ) -> Any:
        bound = nnx.merge(graph, params)
        if room is not None:
            rows_of = lambda a: begins.reshape(1, -1, *[1] * (a.ndim - 2))  # leaves are [repeats, rows, ...]
            state = jax.tree.map(lambda new, old: jnp.where(rows_of(old), new, old), bound.init_state(rows), state)
        logits, state = bound.extend(inputs, state, segment_ids=segments)
        return jnp.sum(jnp.where(segments > 0, token_losses(logits, targets), 0.0)), state

    waiting = iter(documents)
    feeds = [_Row(waiting, align) for _ in range(rows)]
    state = model.init_state(rows)
    nats, tokens, read = 0.0, 0, 0
    pending: jax.Array | None = None
    place, document = np.zeros((2, rows), np.int64)  # of every row: tokens of its document so far, and which it is
    while True:
        filled = [feed.take(chunk) for feed in feeds]
        inputs, targets, segments = (np.stack([row[part] for row in filled]) for part in range(3))
        if not segments.any():
            break
        begins = (segments[:, 0] > 0) & (segments[:, 0] != document)
        document = np.where(begins, segments[:, 0], document)
        place = np.where(begins, 0, place) + (segments > 0).sum(axis=1)
        if room is not None and place.max() > room:
            raise InputError(
                f"a document has more tokens than the {room:,} that attention has room "
                "for: raise model.attention.max_length"
            )
        total, state = extend(params, state, begins, inputs, targets, segments)
        if pending is not None:  # one call behind, so that reading text and computing overlap
            nats += float(pending)
        pending = total
        tokens += int((segments > 0).sum())
        done = sum(feed.bytes for feed in feeds)
        on_progress(done - read)
        read = done
    nats += 0.0 if pending is None else float(pending)
    return Score(nats, tokens, read)


class _Row:
    """One row of the stream: (input, target, segment id) for token after token of document after document."""

    def __init__(self, documents: Iterator[Iterable[Chunk]], align: int) -> None:
        self.bytes = 0
        self._documents, self._align = documents, align
        self._pairs = self._read()
        self._left = np.zeros((3, 0), np.int32)

    def take(self, length: int) -> np.ndarray:
        """The next `[3, length]`, zeros where there is nothing more to read."""
        parts, have = [self._left], self._left.shape[1]
        while have < length and (piece := next(self._pairs, None)) is not None:
            parts.append(piece)
            have += piece.shape[1]
        joined = np.concatenate([*parts, np.zeros((3, max(0, length - have)), np.int32)], axis=1)
        self._left = joined[:, length:]
        return joined[:, :length]

    def _read(self) -> Iterator[np.ndarray]:
        for number, document in enumerate(self._documents, start=1):
            last, place = np.zeros(0, np.int32), 0
            for tokens, size in document:
                self.bytes += size
                known = np.concatenate([last, np.asarray(tokens, np.int32)])
                if len(known) > 1:
                    yield np.stack([known[:-1], known[1:], np.full(len(known) - 1, number, np.int32)])
                    place += len(known) - 1
                last = known[-1:]
            if gap := -place % self._align:
                yield np.zeros((3, gap), np.int32)
