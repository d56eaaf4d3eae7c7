"""Protocols of loss by position: how documents are cut before they are read, and how losses are put into bins."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tttlm.data import Tokenizer
from tttlm.evaluation.texts import Text
from tttlm.inference import stream_losses
from tttlm.model import LanguageModel


@dataclass(frozen=True)
class Protocol:
    """How a document is cut.

    Attributes:
        name: "windows 2048", "stream" or "reset every 2048".
        cut: Tokens after which the state is reset; 0 for never.
        whole: Whether positions count from the start of the document, also after a reset; else from the reset on, and
            an incomplete last window is dropped.
    """

    name: str
    cut: int
    whole: bool

    def length(self, num_tokens: int) -> int:
        """The longest stretch that is read of a document, and so what an attention cache needs room for."""
        return min(self.cut, num_tokens) if self.cut else num_tokens

    def predicted(self, num_tokens: int) -> int:
        """How many tokens of a document are predicted."""
        return num_tokens if self.whole else num_tokens // self.cut * self.cut


def windows(length: int) -> Protocol:
    """Non-overlapping windows from the start of the document on, as arXiv 2407.04620 has them."""
    return Protocol(f"windows {length}", length, whole=False)


def reset_every(length: int) -> Protocol:
    """The tokens of `STREAM`, with the state reset every so many: what is context worth?"""
    return Protocol(f"reset every {length}", length, whole=True)


STREAM = Protocol("stream", 0, whole=True)


def log_bins(length: int) -> list[int]:
    """Where bins of positions begin, and the end: two for every doubling.

    >>> log_bins(20)
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    edges = {0, length}
    power = 1
    while power < length:
        edges |= {power, *([power + power // 2] if power > 1 and power + power // 2 < length else [])}
        power *= 2
    return sorted(edges)


@dataclass(frozen=True)
class Binned:
    """Losses of one document.

    Attributes:
        nats: Summed losses of each bin.
        tokens: How many tokens they are of.
    """

    nats: Float[np.ndarray, "bins"]
    tokens: Int[np.ndarray, "bins"]


def score_protocol(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    protocol: Protocol,
    bins: Sequence[int],
    *,
    num_tokens: Sequence[int],
    batch_size: int,
    chunk: int,
    on_tokens: Callable[[int], Any],
) -> Iterator[tuple[int, Binned]]:
    """Reads documents side by side, and gives each when all of it was scored.

    Args:
        model: The model, with room for what is read.
        tokenizer: Its tokenizer.
        texts: The documents.
        protocol: How they are cut.
        bins: Where bins of positions begin, and the end.
        num_tokens: How many tokens of each document are predicted at most.
        batch_size: Number of stretches that are read in parallel.
        chunk: Number of tokens of a stretch in one call.
        on_tokens: Called with the number of tokens that were scored since the last call.
    """
    pieces: list[tuple[int, int]] = []  # of every stretch: its document, and where positions in it start

    def stretches() -> Iterator[Iterable[np.ndarray]]:
        for number, text in enumerate(texts):
            for start, stretch in _stretches(_limited(text, tokenizer, num_tokens[number]), protocol):
                pieces.append((number, start if protocol.whole else 0))
                yield stretch

    nats, tokens = (np.zeros((len(texts), len(bins) - 1)) for _ in range(2))
    left = np.asarray([protocol.predicted(count) for count in num_tokens])
    for losses in stream_losses(model, stretches(), batch_size=batch_size, chunk=chunk):
        of = np.asarray(pieces)[losses.document]
        at = of[:, 0], np.searchsorted(bins, of[:, 1] + losses.position, side="right") - 1
        np.add.at(nats, at, losses.nats)
        np.add.at(tokens, at, 1)
        np.subtract.at(left, of[:, 0], 1)
        on_tokens(len(losses.nats))
        for number in np.unique(of[:, 0]):
            if left[number] == 0:
                yield int(number), Binned(nats[number], tokens[number].astype(np.int64))


def _limited(text: Text, tokenizer: Tokenizer, limit: int) -> Iterator[np.ndarray]:
    """The tokens of a document, of which so many are predicted at most."""
    left = limit + 1
    for tokens, _ in text.chunks(tokenizer):
        yield np.asarray(tokens[:left], np.int64)
        left -= min(left, len(tokens))
        if not left:
            return


def _stretches(tokens: Iterator[np.ndarray], protocol: Protocol) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
    """The stretches of a document, each with the position that its first prediction has in the document."""
    if protocol.cut == 0:
        yield 0, tokens
        return
    length, start, held = protocol.cut, 0, np.zeros(0, np.int64)
    for piece in tokens:
        held = np.concatenate([held, piece])
        while len(held) > length:
            yield start, [held[: length + 1]]
            held, start = held[length:], start + length
    if protocol.whole and len(held) > 1:
        yield start, [held]
