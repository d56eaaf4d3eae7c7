"""Recall of a model: exact match and likelihood of the answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tttlm.data.generated import Instance
from tttlm.errors import InputError
from tttlm.inference import Losses

Scorer = Callable[[Iterable[Iterable[np.ndarray]]], Iterator[Losses]]


@dataclass(frozen=True)
class Recalled:
    """The recall of a model on some sequences.

    Attributes:
        answers: Number of answers.
        exact: Number of answers that greedy decoding gives: each of their tokens is the most likely one after those
            before it.
        tokens: Number of tokens of the answers.
        hits: Number of those tokens that are the most likely ones.
        nats: Summed -log p of the answers' tokens.
    """

    answers: int
    exact: int
    tokens: int
    hits: int
    nats: float

    @property
    def exact_match(self) -> float:
        """Correct answers in percent."""
        return 100 * self.exact / self.answers

    @property
    def token_accuracy(self) -> float:
        """Correct tokens of answers in percent."""
        return 100 * self.hits / self.tokens

    @property
    def nats_per_answer(self) -> float:
        """Mean -log p of an answer."""
        return self.nats / self.answers


def recalled(instances: Sequence[Instance], score: Scorer) -> Recalled:
    """Reads sequences with their answers, and scores every token of an answer.

    Args:
        instances: The sequences.
        score: Scores token sequences, see `tttlm.inference.stream_losses`.

    Raises:
        InputError: A sequence has no context or no answer, or was truncated.
    """
    for instance in instances:
        if not instance.answers or min(start for start, _ in instance.answers) < 2:
            raise InputError("a recall task has a sequence without a context or without an answer: raise its length")
        if max(stop for _, stop in instance.answers) > len(instance.tokens):
            raise InputError("a recall task has a sequence that ends before its answers: raise its length")
    hits = [np.zeros(len(instance.tokens), bool) for instance in instances]
    nats = [np.full(len(instance.tokens), -np.inf) for instance in instances]
    for losses in score([instance.tokens] for instance in instances):
        for number in np.unique(losses.document):
            of = losses.document == number
            nats[number][losses.position[of] + 1] = losses.nats[of]
            hits[number][losses.position[of] + 1] = losses.hit[of]
    found: list[tuple[int, bool, int, int]] = []
    total = 0.0
    for instance, hit, nat in zip(instances, hits, nats, strict=True):
        if np.isneginf(nat[1:]).any():  # not NaN, which is the loss of a model whose parameters are not finite
            raise InputError(
                "a recall task has a sequence of which the model read only a part: score its complete sequences"
            )
        for start, stop in instance.answers:
            found.append((1, bool(hit[start:stop].all()), stop - start, int(hit[start:stop].sum())))
            total += float(nat[start:stop].sum())
    answers, exact, tokens, right = (sum(column) for column in zip(*found, strict=True))
    return Recalled(answers, exact, tokens, right, total)
