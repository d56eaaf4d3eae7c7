"""Held-out loss by position: how much better a model predicts the more of a document it has read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.data import Document
from tttlm.model import LanguageModel
from tttlm.progress import progress_bar
from tttlm.ranges import Count, CountOrZero
from tttlm.training.loss import token_losses


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
    """Streams stretches through `extend`, in memory that does not depend on their length.

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
    graph, params = nnx.split(model)

    @jax.jit
    def extend(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        logits, state = nnx.merge(graph, params).extend(inputs, state)
        return token_losses(logits, targets), state

    parts = sorted(parts, key=lambda part: -len(part.tokens))
    count, length = 1 + max(part.document for part in parts), bins[-1]
    nats, tokens = np.zeros((2, count, len(bins) - 1))
    start_of = np.asarray(bins[:-1])
    with progress_bar(sum(len(part.tokens) - 1 for part in parts), description, unit="token") as bar:
        for first in range(0, len(parts), rows):
            group = parts[first : first + rows]
            longest = len(group[0].tokens) - 1
            padded = np.zeros((rows, -(-longest // chunk) * chunk + 1), np.int32)
            real = np.zeros((rows, max(length, padded.shape[1] - 1)))
            for row, part in enumerate(group):
                padded[row, : len(part.tokens)] = part.tokens
                real[row, : len(part.tokens) - 1] = 1
            state, losses = model.init_state(rows), np.zeros(real.shape)
            for at in range(0, padded.shape[1] - 1, chunk):
                piece = padded[:, at : at + chunk + 1]
                out, state = extend(params, state, jnp.asarray(piece[:, :-1]), jnp.asarray(piece[:, 1:]))
                losses[:, at : at + chunk] = out
            losses *= real
            for row, part in enumerate(group):
                nats[part.document] += np.add.reduceat(losses[row, :length], start_of)
                tokens[part.document] += np.add.reduceat(real[row, :length], start_of)
            bar.update(sum(len(part.tokens) - 1 for part in group))
    return nats, tokens
