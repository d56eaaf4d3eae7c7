"""Streams hold every sample they promise, in the order they promise."""

import numpy as np
import pytest

from tests.adaptation.models import samples, tiny
from tttlm.adaptation import continual, correlated_labels, episodic, errors, growing, mixed, no_adaptation, run_stream
from tttlm.errors import InputError

LABELS = np.repeat(np.arange(5), 40)
SHIFTS = {severity: np.arange(200)[:, None] + 1000.0 * severity for severity in (3, 1, 2)}  # tells sample and shift


def test_episodic_and_continual_hold_every_sample_of_every_shift_in_order_and_differ_in_resets():
    for stream, starts in ((episodic(SHIFTS, LABELS), [0, 200, 400]), (continual(SHIFTS, LABELS), [0])):
        np.testing.assert_array_equal(stream.inputs, np.concatenate(list(SHIFTS.values())))
        np.testing.assert_array_equal(stream.labels, np.tile(LABELS, 3))
        assert np.flatnonzero(stream.starts).tolist() == starts
        assert stream.shifts.tolist() == [0] * 200 + [1] * 200 + [2] * 200


def test_a_growing_shift_brings_every_sample_once_by_rising_severity():
    stream = growing(SHIFTS, LABELS)
    severity, sample = divmod(stream.inputs[:, 0], 1000)
    assert np.all(np.diff(severity) >= 0)
    assert set(severity) == {1, 2, 3}
    np.testing.assert_array_equal(sample, np.arange(200))
    np.testing.assert_array_equal(np.array(list(SHIFTS))[stream.shifts], severity)
    with pytest.raises(InputError, match="cannot be spread"):
        growing(SHIFTS, LABELS[:2])


def test_a_mixed_stream_draws_a_shift_for_every_sample():
    stream = mixed(SHIFTS, LABELS, seed=1)
    severity, sample = divmod(stream.inputs[:, 0], 1000)
    np.testing.assert_array_equal(sample, np.arange(200))
    assert min(np.sum(severity == s) for s in (1, 2, 3)) > 40
    np.testing.assert_array_equal(np.array(list(SHIFTS))[stream.shifts], severity)
    assert np.array_equal(mixed(SHIFTS, LABELS, seed=1).inputs, stream.inputs)
    assert not np.array_equal(mixed(SHIFTS, LABELS, seed=2).inputs, stream.inputs)


def test_correlated_labels_come_in_bunches_and_none_is_lost():
    changes = {}
    for concentration in (0.01, 1000.0):
        stream = correlated_labels(SHIFTS, LABELS, concentration=concentration)
        part = stream.inputs[:200, 0] - 3000
        np.testing.assert_array_equal(np.sort(part), np.arange(200))
        np.testing.assert_array_equal(LABELS[part.astype(int)], stream.labels[:200])
        changes[concentration] = np.sum(np.diff(stream.labels[:200]) != 0)
    assert changes[0.01] < changes[1000.0]


def test_a_method_is_set_back_where_a_stream_says():
    calls = []

    class Watched:
        batch_size = 3

        def reset(self):
            calls.append("reset")

        def __call__(self, inputs):
            calls.append(len(inputs))
            return np.zeros((len(inputs), 2))

    run_stream(Watched(), episodic({"a": samples(8), "b": samples(8)}, np.zeros(8, int)), piece=7)
    assert calls == ["reset", 6, 2, "reset", 6, 2]


def test_predictions_of_a_stream_are_those_of_the_model():
    stream = continual({"a": samples(9)}, np.zeros(9, int))
    predictions = run_stream(no_adaptation(tiny()), stream, piece=4)
    np.testing.assert_allclose(predictions, tiny()(samples(9)), rtol=1e-5, atol=1e-6)
    wrong = errors(predictions, np.argmax(predictions, -1))
    assert not wrong.any()
    assert errors(predictions, (np.argmax(predictions, -1) + 1) % 3).all()


def test_shifts_of_other_lengths_are_refused():
    with pytest.raises(InputError, match="has 5 samples"):
        continual({"a": samples(5)}, np.zeros(4, int))
