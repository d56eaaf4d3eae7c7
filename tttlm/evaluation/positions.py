"""Held-out loss by position: how much better a model predicts the more of a document it has read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tttlm.data import Document
from tttlm.inference import stream_losses
from tttlm.model import LanguageModel
from tttlm.progress import progress_bar
from tttlm.ranges import Count, CountOrZero


@dataclass(frozen=True)
class PositionsConfig:
    """What of the held-out documents is read: stretches of one length, each from a fresh state."""

    length: CountOrZero = 0
    """Tokens of a stretch; 0 is four times the length of a training row."""
    stretches: Count = 8
    """Stretches of a document, spread evenly over it; a shorter one is read whole."""
    documents: Count = 64
    """Documents that are read, spread evenly over those there are."""
    rows: Count = 16
    """Stretches that are read side by side."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `[n + 1]` of a document, of which all but the first are predicted."""

    document: int
    tokens: np.ndarray


def edges(length: int, trained: int) -> list[int]:
    """Where bins of positions begin, and the end: powers of two, and the length of the rows trained on.

    >>> edges(20, 6)
    [0, 1, 2, 4, 6, 8, 16, 20]
    """
    powers = [0, *(2**n for n in range(length.bit_length()))]
    return sorted({edge for edge in (*powers, trained) if edge < length} | {length})


def some(documents: Sequence[Document], count: int) -> list[Document]:
    """At most `count` of them, spread evenly."""
    places = np.linspace(0, len(documents) - 1, min(count, len(documents))).astype(int)
    return [documents[place] for place in places]


def stretches(documents: Iterable[Document], length: int, count: int) -> list[Stretch]:
    """At most `count` stretches of every document, without overlap, spread evenly; the first one is its beginning."""
    result = []
    for number, document in enumerate(documents):
        predicted = len(document.tokens) - 1
        most = max(1, min(count, predicted // length))
        for start in np.linspace(0, max(0, predicted - length), most).astype(int):
            result.append(Stretch(number, np.asarray(document.tokens[start : start + length + 1], np.int32)))
    return result


def losses_by_position(
    model: LanguageModel, parts: Sequence[Stretch], bins: Sequence[int], *, rows: int, chunk: int, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores stretches, in memory that does not depend on their length.

    Args:
        model: bound to its parameters; an attention cache needs room for the longest stretch.
        parts: of documents numbered from 0.
        bins: where bins of positions begin, and the end; position 0 sees one token.
        rows: stretches read side by side.
        chunk: tokens of a row in one call.
        description: in front of the progress bar.

    Returns:
        summed losses in nats and numbers of tokens, both float64 `[documents, bins]`.
    """
    parts = sorted(parts, key=lambda part: -len(part.tokens))
    of = np.asarray([part.document for part in parts])
    shape = 1 + int(of.max()), len(bins) - 1
    nats, tokens = np.zeros((2, *shape))
    with progress_bar(sum(len(part.tokens) - 1 for part in parts), description, unit="token") as bar:
        for losses in stream_losses(model, ([part.tokens] for part in parts), rows=rows, chunk=chunk):
            at = of[losses.document], np.searchsorted(bins, losses.position, side="right") - 1
            np.add.at(nats, at, losses.nats)
            np.add.at(tokens, at, 1)
            bar.update(len(losses.nats))
    return nats, tokens
