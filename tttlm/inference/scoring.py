"""The loss of every token of documents of any length, streamed in parallel in constant memory."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.inference.chunks import Chunks
from tttlm.inference.reading import begin, check_tokens
from tttlm.model import LanguageModel

LOGITS = 1 << 24  # largest number of logits in memory at a time


class Losses(NamedTuple):
    """Tokens that were scored together, of one document or several.

    Attributes:
        document: The index of each token's document, in the given order.
        position: The number of tokens of its document before it, without the first.
        nats: -log p of each token given all before it in its document.
        hit: Whether the token is the most likely one.
    """

    document: Int[np.ndarray, "N"]
    position: Int[np.ndarray, "N"]
    nats: Float[np.ndarray, "N"]
    hit: Bool[np.ndarray, "N"]


def stream_losses(
    model: LanguageModel,
    documents: Iterable[Iterable[Int[np.ndarray, "T"]]],
    *,
    batch_size: int = 8,
    chunk: int = 512,
) -> Iterator[Losses]:
    """Scores documents of any length; each is read as if it were alone.

    `batch_size` documents are read in parallel, and where one ends the next begins. A document starts on a mini-batch
    boundary, so that every chunk takes the same path as in training. The cache of full attention is emptied at the
    start of a chunk; it must be as long as the longest document.

    Args:
        model: The model, bound to its parameters.
        documents: Each an iterable of token arrays, read as needed. The first token of a document (its BOS, for
            instance) is not predicted.
        batch_size: Number of documents that are read in parallel.
        chunk: Number of tokens of a document in one call, rounded up to a multiple of the model's mini-batch size.

    Raises:
        InputError: A document is longer than an attention cache, or has a token that is not in the vocabulary.
    """
    align, room = model.config.alignment, model.config.cache_length
    chunk = -(-chunk // align) * align
    graph, params = nnx.split(model)
    waiting = zip(count(), documents)
    feeds = [_Row(model, waiting, align if room is None else chunk) for _ in range(batch_size)]
    chunks = Chunks(model, begin(model, batch_size).state)
    ids = np.zeros(batch_size, np.int32)  # the id of the document in progress in the state
    pending: tuple[tuple[Array, Array], np.ndarray] | None = None
    while True:
        filled = np.stack([feed.take(chunk) for feed in feeds])
        inputs, targets, document, position = filled.swapaxes(0, 1)
        real = document >= 0
        if not real.any():
            break
        if room is not None and (most := int(position.max(initial=0, where=real)) + 1) > room:
            raise InputError(
                f"a document has more than the {room:,} tokens that attention has room for (it is at {most:,}): "
                "raise max_length"
            )
        begins = real[:, 0] & (position[:, 0] == 0)
        several = ((position == 0) & real)[:, 1:].any()
        segments = _segments(document, position, ids) if several else None
        if segments is None:
            ids = np.where(begins, 1, np.maximum(ids, 1))
        else:
            begins = np.zeros(batch_size, bool)
            ids = np.where(real.any(axis=1), segments.max(axis=1), ids)
        if begins.any():
            chunks.start_again(begins)
        h = chunks(inputs.astype(np.int32), segments, on_boundary=True)
        found = _score(graph, params, h, targets.astype(np.int32))
        if pending is not None:  # results are read one call later, so that reading text and computing overlap
            yield _found(*pending)
        pending = found, np.stack([document, position])
    if pending is not None:
        yield _found(*pending)


def _found(found: tuple[Array, Array], of: np.ndarray) -> Losses:
    document, position = of
    real = document >= 0
    nats, hit = (np.asarray(a)[real] for a in found)
    return Losses(document[real], position[real], nats, hit)


def _segments(document: np.ndarray, position: np.ndarray, ids: np.ndarray) -> Int[np.ndarray, "B T"]:
    """Ids that continue from those in progress and are incremented at the start of a document; 0 at padding."""
    real = document >= 0
    started = np.cumsum((position == 0) & real, axis=1)
    return np.where(real, np.maximum(ids, 1)[:, None] + started, 0).astype(np.int32)


class _Row:
    """One stream: (input, target, document, position) of the tokens of one document after another."""

    def __init__(self, model: LanguageModel, documents: Iterator[tuple[int, Iterable[np.ndarray]]], align: int) -> None:
        self._model, self._documents, self._align = model, documents, align
        self._pairs = self._read()
        self._left = np.zeros((4, 0), np.int64)

    def take(self, length: int) -> Int[np.ndarray, "4 T"]:
        """The next tokens; document -1 for padding."""
        parts, have = [self._left], self._left.shape[1]
        while have < length and (piece := next(self._pairs, None)) is not None:
            parts.append(piece)
            have += piece.shape[1]
        joined = np.concatenate([*parts, _padding(max(0, length - have))], axis=1)
        self._left = joined[:, length:]
        return joined[:, :length]

    def _read(self) -> Iterator[np.ndarray]:
        for number, document in self._documents:
            last, at = np.zeros(0, np.int64), 0
            for tokens in document:
                check_tokens(self._model, [np.asarray(tokens)])
                known = np.concatenate([last, np.asarray(tokens, np.int64)])
                if (n := len(known) - 1) > 0:
                    yield np.stack([known[:-1], known[1:], np.full(n, number), np.arange(at, at + n)])
                    at += n
                last = known[-1:]
            if gap := -at % self._align:
                yield _padding(gap)


def _padding(length: int) -> Int[np.ndarray, "4 T"]:
    empty = np.zeros((4, length), np.int64)
    empty[2] = -1
    return empty


@partial(jax.jit, static_argnums=(0,))
def _score(
    graph: Any, params: Any, h: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """-log p of every target, and whether it is the most likely token."""
    model: LanguageModel = nnx.merge(graph, params)
    batch_size, time = targets.shape
    most = max(1, LOGITS // (batch_size * model.config.vocab_size))
    piece = next(size for size in range(min(most, time), 0, -1) if time % size == 0)

    def scored(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, targets = model.head(part[0]), part[1]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == targets

    in_pieces = lambda a: a.reshape(batch_size, -1, piece, *a.shape[2:]).swapaxes(0, 1)
    found = jax.lax.map(scored, (in_pieces(h), in_pieces(targets)))
    nats, hit = (a.swapaxes(0, 1).reshape(batch_size, time) for a in found)
    return nats, hit
