"""Held-out loss by position: how much a model gains from more context."""

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
    """Configuration of the stretches of held-out documents that are scored, each from the initial state."""

    length: CountOrZero = 0
    """Number of tokens of a stretch; 0 is four times the training sequence length."""
    stretches: Count = 8
    """Number of stretches of a document, evenly spaced; a shorter document is read completely."""
    documents: Count = 64
    """Number of documents that are read, evenly spaced among all."""
    batch_size: Count = 16
    """Number of stretches that are read in parallel."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `[n + 1]` of a document, of which all but the first are predicted."""

    document: int
    tokens: np.ndarray


def edges(length: int, trained: int) -> list[int]:
    """Starts of the bins of positions, and the end of the last: powers of two, and the training sequence length.

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
    """At most `count` stretches of every document, without overlap, evenly spaced; the first is its beginning."""
    result = []
    for number, document in enumerate(documents):
        predicted = len(document.tokens) - 1
        most = max(1, min(count, predicted // length))
        for start in np.linspace(0, max(0, predicted - length), most).astype(int):
            result.append(Stretch(number, np.asarray(document.tokens[start : start + length + 1], np.int32)))
    return result


def losses_by_position(
    model: LanguageModel,
    parts: Sequence[Stretch],
    bins: Sequence[int],
    *,
    batch_size: int,
    chunk: int,
    description: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores stretches, in memory that does not depend on their length.

    Args:
        model: the model, bound to its parameters; an attention cache must be as long as the longest stretch.
        parts: stretches of documents numbered from 0.
        bins: starts of the bins of positions, and the end of the last; position 0 has one token of context.
        batch_size: number of stretches that are read in parallel.
        chunk: number of tokens of a stretch in one call.
        description: label of the progress bar.

    Returns:
        Summed losses in nats and numbers of tokens, both float64 `[documents, bins]`.
    """
    parts = sorted(parts, key=lambda part: -len(part.tokens))
    of = np.asarray([part.document for part in parts])
    shape = 1 + int(of.max()), len(bins) - 1
    nats, tokens = np.zeros((2, *shape))
    with progress_bar(sum(len(part.tokens) - 1 for part in parts), description, unit="token") as bar:
        for losses in stream_losses(model, ([part.tokens] for part in parts), batch_size=batch_size, chunk=chunk):
            at = of[losses.document], np.searchsorted(bins, losses.position, side="right") - 1
            np.add.at(nats, at, losses.nats)
            np.add.at(tokens, at, 1)
            bar.update(len(losses.nats))
    return nats, tokens
