"""Loss, perplexity and bits per byte of text of any length, computed in a stream."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tttlm.inference import stream_losses
from tttlm.model import LanguageModel

Chunk = tuple[np.ndarray, int]  # tokens of a document, and the number of bytes of their text


@dataclass(frozen=True)
class Score:
    """The score of a model on a text.

    Attributes:
        nats: the summed -log p of every token given all before it in its document.
        tokens: number of predicted tokens.
        bytes: number of bytes of UTF-8 of those tokens.
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
        """`exp(loss)`, for losses of at most 700 nats."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which can be compared between tokenizers."""
        return self.nats / math.log(2) / max(self.bytes, 1)


def stream_score(
    model: LanguageModel,
    documents: Iterable[Iterable[Chunk]],
    *,
    batch_size: int = 8,
    chunk: int = 512,
    on_progress: Callable[[int], Any] = lambda bytes_read: None,
) -> Score:
    """Scores documents in constant memory, however long they are; see `tttlm.inference.stream_losses`.

    Args:
        model: the model, bound to its parameters.
        documents: each an iterable of (tokens, number of their bytes), read as needed. The first token of a document
            (its BOS, for instance) is not predicted.
        batch_size: number of documents that are read in parallel.
        chunk: number of tokens of a document in one call.
        on_progress: called with the number of bytes read since the last call.

    Raises:
        InputError: a document is longer than an attention cache.
    """
    read = 0

    def tokens_of(document: Iterable[Chunk]) -> Iterator[np.ndarray]:
        nonlocal read
        for tokens, size in document:
            read += size
            yield tokens

    nats, tokens, reported = 0.0, 0, 0
    for losses in stream_losses(
        model, (tokens_of(document) for document in documents), batch_size=batch_size, chunk=chunk
    ):
        nats += float(losses.nats.sum(dtype=np.float64))
        tokens += len(losses.nats)
        on_progress(read - reported)
        reported = read
    return Score(nats, tokens, read)
