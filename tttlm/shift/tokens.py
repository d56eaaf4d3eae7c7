"""Token counts, token frequencies as features, and features of a language model, from stretches of tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import special

from tttlm.model import LanguageModel
from tttlm.shift.confidence import Predictions
from tttlm.shift.reading import Stretches

_VOCABULARY = 10_000


@dataclass(frozen=True)
class Counted:
    """Counts of the commonest tokens of two samples; the other tokens together are the last column.

    Attributes:
        a, b: counts `[units, V]`; a unit is a document, or a stretch if a sample has too few documents.
        ids: the token of every column but the last, most frequent first.
        by_document: whether units are documents.
    """

    a: np.ndarray
    b: np.ndarray
    ids: np.ndarray
    by_document: bool


def count_tokens(a: Stretches, b: Stretches, *, fewest: int = 4) -> Counted:
    """Counts tokens by document if both samples have at least `fewest` documents, else by stretch."""
    totals = np.bincount(np.concatenate([*a.tokens, *b.tokens]).astype(np.int64))
    order = np.argsort(-totals, kind="stable")
    ids = order[: min(_VOCABULARY, np.count_nonzero(totals))]
    column = np.full(len(totals), len(ids))
    column[ids] = np.arange(len(ids))
    by_document = min(len(np.unique(s.documents)) for s in (a, b)) >= fewest
    counts = [_counts(sample, column, len(ids) + 1, by_document) for sample in (a, b)]
    return Counted(counts[0], counts[1], ids, by_document)


def _counts(sample: Stretches, column: np.ndarray, size: int, by_document: bool) -> np.ndarray:
    units = np.unique(sample.documents, return_inverse=True)[1] if by_document else np.arange(len(sample.tokens))
    counts = np.zeros((int(units.max()) + 1, size), np.float32)
    for unit, tokens in zip(units, sample.tokens, strict=True):
        counts[unit] += np.bincount(column[tokens], minlength=size)
    return counts


def frequency_features(sample: Stretches, ids: np.ndarray) -> np.ndarray:
    """Features `[N, len(ids)]`: the square roots of the frequencies of these tokens in each stretch.

    Their distances are Hellinger distances, in which both common and rare tokens count.
    """
    column = np.full(int(max(ids.max(), max(t.max() for t in sample.tokens))) + 1, len(ids))
    column[ids] = np.arange(len(ids))
    counts = np.stack([np.bincount(column[t], minlength=len(ids) + 1) for t in sample.tokens])
    return np.sqrt(counts[:, :-1] / counts.sum(1, keepdims=True)).astype(np.float32)


def read_by_model(
    model: LanguageModel, sample: Stretches, *, length: int, batch_size: int = 16
) -> tuple[np.ndarray, Predictions]:
    """Features `[N, hidden_size]` of stretches, each read from its start, and the predictions of their last tokens.

    The features are the mean over a stretch of the head's inputs. A stretch of one token has no prediction.

    Args:
        length: the largest number of tokens of a stretch; shorter ones are padded, and padding is excluded.
        batch_size: number of stretches in a batch.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def read(state, tokens, lengths):
        model = nnx.merge(graph, state)
        h = model.features(tokens, lengths=lengths).astype(jnp.float32)  # 0 at padding
        rows = jnp.arange(len(tokens))
        log_p = jax.nn.log_softmax(model.head(h[rows, lengths - 2]))
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, 1)
        right = jnp.argmax(log_p, 1) == tokens[rows, lengths - 1]
        return jnp.sum(h, 1) / lengths[:, None], (jnp.exp(log_p.max(1)), entropy, right)

    features, predictions = [], []
    for start in range(0, len(sample.tokens), batch_size):
        batch = sample.tokens[start : start + batch_size]
        tokens, lengths = np.zeros((batch_size, length), np.int32), np.ones(batch_size, np.int32)
        for row, stretch in enumerate(batch):
            tokens[row, : len(stretch)], lengths[row] = stretch, len(stretch)
        of_batch, of_last = jax.tree.map(np.asarray, read(state, tokens, lengths))
        features.append(of_batch[: len(batch)])
        predicted = (np.arange(batch_size) < len(batch)) & (lengths > 1)
        predictions.append(Predictions(*(values[predicted] for values in of_last)))
    return np.concatenate(features), Predictions(*map(np.concatenate, zip(*predictions, strict=True)))


def token_differences(counted: Counted) -> tuple[np.ndarray, np.ndarray]:
    """The contribution of each token to the Jensen-Shannon divergence, and its frequency in B minus A, `[V - 1]`."""
    p, q = (counts.sum(0, dtype=np.float64) / counts.sum(dtype=np.float64) for counts in (counted.a, counted.b))
    m = (p + q) / 2
    return ((special.rel_entr(p, m) + special.rel_entr(q, m)) / 2)[:-1], (q - p)[:-1]
