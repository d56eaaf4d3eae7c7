"""Streamed losses are those of a forward pass of each document, whatever is read beside it and however it is cut."""

import numpy as np
import pytest

from tests.inference.small import MIXERS, ids, logits_of, made
from tttlm.errors import InputError
from tttlm.inference import stream_losses

LENGTHS = (40, 1, 64, 17, 33, 2, 5)


def documents() -> list[list[np.ndarray]]:
    """In pieces of all sizes, empty ones included."""
    rng = np.random.default_rng(0)
    return [np.split(ids(n, n), np.sort(rng.integers(0, n + 1, 3))) for n in LENGTHS]


def streamed(model, documents, **options) -> dict[int, np.ndarray]:
    """`[T, 2]` of each document: the loss at every position, and whether the token was the likeliest."""
    found: dict[int, dict[int, tuple[float, bool]]] = {}
    for piece in stream_losses(model, documents, **options):
        for document, position, nats, hit in zip(*piece, strict=True):
            assert position not in found.setdefault(int(document), {})
            found[int(document)][int(position)] = float(nats), bool(hit)
    return {d: np.asarray([of[n] for n in range(len(of))]) for d, of in found.items()}


OTHERS = sorted({*MIXERS} - {"ttt_linear"})


@pytest.mark.parametrize(
    "mixers", [("ttt_linear",), *(pytest.param((name,), marks=pytest.mark.slow) for name in OTHERS)]
)
def test_losses_are_those_of_a_whole_forward_pass(mixers, x64):
    model = made(*mixers, dtype="float64", param_dtype="float64")
    found = [
        streamed(model, documents(), batch_size=batch_size, chunk=chunk) for batch_size, chunk in ((3, 8), (1, 96))
    ]
    for number, length in enumerate(LENGTHS):
        logits = logits_of(model, ids(length, length))
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        targets = ids(length, length)[1:]
        expected = -logits[np.arange(length - 1), targets]
        for one in found:
            nats, hit = one.get(number, np.zeros((0, 2))).T
            np.testing.assert_allclose(nats, expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_array_equal(hit, logits[:-1].argmax(axis=1) == targets)


def test_documents_are_read_as_they_are_needed_and_no_more_is_held():
    """Of an endless text, what was scored is bounded by what was asked for."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield ids(10)

    stream = stream_losses(made("ttt_linear"), [endless()], batch_size=1, chunk=20)
    for _ in range(5):
        next(stream)
    assert len(read) < 20


def test_what_does_not_fit_is_refused_in_one_line():
    with pytest.raises(InputError, match="more than the 96 tokens that attention has room for"):
        list(stream_losses(made("attention"), [[ids(120)]], batch_size=1, chunk=32))
    with pytest.raises(InputError, match="token 99 is not in the model's vocabulary"):
        list(stream_losses(made("attention"), [[np.array([1, 99])]]))
