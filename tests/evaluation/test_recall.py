"""Recall tasks ask for what was said: who copies from the context gets all of it, who guesses gets none."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from tttlm.data.generated import Instance, copy, mqar
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.errors import InputError
from tttlm.evaluation.recall import recalled
from tttlm.evaluation.recall_tasks import HAYSTACK, in_haystack
from tttlm.inference import Losses

BYTES = ByteTokenizer()
HAY = np.asarray(BYTES.encode("It was a bright cold day in April, and the clocks were striking thirteen. " * 60))


def oracle(documents: Iterable[Iterable[np.ndarray]]) -> Iterator[Losses]:
    """A model that copies: after what it has read last it expects what came after the longest same stretch before."""
    for number, document in enumerate(documents):
        tokens = np.concatenate([np.atleast_1d(part) for part in document]).tolist()
        hits = []
        for at in range(1, len(tokens)):
            best, expected = 0, None
            for before in range(1, at):
                same = 0
                while same < min(before, 40) and tokens[before - 1 - same] == tokens[at - 1 - same]:
                    same += 1
                if same > best:
                    best, expected = same, tokens[before]
            hits.append(expected == tokens[at])
        hit = np.asarray(hits)
        yield Losses(np.full(len(hit), number), np.arange(len(hit)), np.where(hit, 0.0, 5.0), hit)


def guesses(documents: Iterable[Iterable[np.ndarray]]) -> Iterator[Losses]:
    for losses in oracle(documents):
        yield losses._replace(hit=np.zeros_like(losses.hit), nats=np.full(len(losses.nats), 5.0))


def instances(task: str, count: int = 3) -> list[Instance]:
    rng = np.random.default_rng(0)
    if task == "mqar":
        return [mqar(8, 100, rng, length=60) for _ in range(count)]
    if task == "copy":
        return [copy(20, 100, rng) for _ in range(count)]
    return [in_haystack(task, HAY, BYTES, length=420, depth=n / 2, rng=rng) for n in range(count)]


@pytest.mark.parametrize("task", [*HAYSTACK, "mqar", "copy"])
def test_a_model_that_copies_scores_100_and_one_that_guesses_0(task):
    made = instances(task)
    found = recalled(made, oracle)
    assert (found.exact_match, found.token_accuracy, found.nats_per_answer) == (100, 100, 0)
    assert found.answers == sum(len(one.answers) for one in made)
    none = recalled(made, guesses)
    assert (none.exact_match, none.token_accuracy) == (0, 0)
    assert none.nats == 5.0 * none.tokens


@pytest.mark.parametrize("task", HAYSTACK)
def test_the_haystack_has_the_needle_where_it_is_said_and_the_question_at_the_end(task):
    rng = np.random.default_rng(1)
    places = []
    for depth in (0.0, 0.5, 1.0):
        one = in_haystack(task, HAY, BYTES, length=500, depth=depth, rng=rng)
        text = BYTES.decode(one.tokens.tolist())
        assert len(one.tokens) == 500
        answers = [BYTES.decode(one.tokens[a:b].tolist()).strip() for a, b in one.answers]
        assert all(answer.isdigit() and len(answer) == 5 for answer in answers)
        assert len(set(answers)) == (4 if task == "needles" else 1)
        assert all(text.count(answer) == 2 for answer in answers)
        assert text.count("The number of") == {"passkey": 0, "needle": 2, "needles": 8, "distractors": 6}[task]
        places.append(text.index(answers[0]) / len(text))
    assert places[0] < 0.1 < places[1] < 0.7 < places[2]


def test_what_measures_nothing_is_refused_and_not_scored_0():
    rng = np.random.default_rng(0)
    made = instances("passkey")[0]
    with pytest.raises(InputError, match="the model read only a part"):
        recalled([made], lambda documents: (loss._replace(**cut(loss)) for loss in oracle(documents)))
    diverged = recalled(
        [made], lambda documents: (loss._replace(nats=loss.nats * np.nan) for loss in oracle(documents))
    )
    assert np.isnan(diverged.nats)
    with pytest.raises(InputError, match="without a context"):
        recalled([Instance(made.tokens[-6:], ((1, 6),))], oracle)
    with pytest.raises(InputError, match="ends before its answers"):
        recalled([Instance(made.tokens[:-3], made.answers)], oracle)
    with pytest.raises(InputError, match="passkey takes more than the 60 tokens"):
        in_haystack("passkey", HAY, BYTES, length=60, depth=0.5, rng=rng)
    with pytest.raises(InputError, match="fewer than a haystack of"):
        in_haystack("passkey", HAY[:100], BYTES, length=500, depth=0.5, rng=rng)
    with pytest.raises(InputError, match="take 33 tokens, got a length of 32"):
        mqar(8, 100, rng, length=32)
    with pytest.raises(InputError, match="50 pairs need more than 100 tokens"):
        mqar(50, 100, rng)


def cut(losses: Losses) -> dict[str, np.ndarray]:
    return {name: getattr(losses, name)[5:] for name in losses._fields}


def test_the_same_seed_makes_the_same_sequences():
    for task in (*HAYSTACK, "mqar", "copy"):
        for a, b in zip(instances(task), instances(task), strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
