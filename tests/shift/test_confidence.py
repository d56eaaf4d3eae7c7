"""Confidence: the predictions of accuracy are right where their assumption holds, and their tests have their level."""

import numpy as np
import pytest
from scipy import special, stats

from tttlm.errors import InputError
from tttlm.shift import (
    average_thresholded_confidence,
    confidence_drop,
    difference_of_confidences,
    entropy_rise,
)
from tttlm.shift.confidence import Predictions
from tttlm.shift.panel import compare_predictions


def classified(rng, n, sharpness):
    """Logits that are calibrated exactly: labels are drawn from their own softmax."""
    logits = sharpness * rng.standard_normal((n, 4))
    p = special.softmax(logits, 1)
    labels = (rng.random((n, 1)) > np.cumsum(p, 1)).sum(1).clip(max=3)
    return logits, labels


def accuracy(logits, labels):
    return np.mean(logits.argmax(1) == labels)


def test_drop_and_rise_are_differences_of_means():
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((300, 5)) * 3, rng.standard_normal((200, 5))
    p, q = special.softmax(source, 1), special.softmax(target, 1)
    drop, rise = confidence_drop(source, target), entropy_rise(source, target)
    assert drop.value == pytest.approx(p.max(1).mean() - q.max(1).mean(), abs=1e-6)
    assert rise.value == pytest.approx(stats.entropy(q, axis=1).mean() - stats.entropy(p, axis=1).mean(), abs=1e-6)
    assert drop.low < drop.value < drop.high
    welch = stats.ttest_ind(p.max(1), q.max(1), equal_var=False, alternative="greater")
    assert np.log(drop.p_value) == pytest.approx(np.log(welch.pvalue), rel=1e-4)
    ends = stats.ttest_ind(p.max(1), q.max(1), equal_var=False).confidence_interval(0.95)
    assert (drop.low, drop.high) == pytest.approx((ends.low, ends.high), abs=1e-6)
    # Log-probabilities are logits, and any constant may be added.
    assert confidence_drop(np.log(p), np.log(q)).value == pytest.approx(drop.value, abs=1e-6)
    assert confidence_drop(source + 50, target - 50).value == pytest.approx(drop.value, abs=1e-5)


def test_predicted_accuracy_is_right_for_calibrated_confidence():
    rng = np.random.default_rng(0)
    source, labels = classified(rng, 4000, 3.0)
    target, target_labels = classified(rng, 4000, 1.0)
    truth = accuracy(target, target_labels)
    assert accuracy(source, labels) - truth > 0.2
    predicted = difference_of_confidences(source, labels, target)
    assert predicted.value == pytest.approx(truth, abs=0.025)
    for score in ("confidence", "entropy"):
        assert average_thresholded_confidence(source, labels, target, score=score).value < accuracy(source, labels)


def test_atc_is_exact_where_the_threshold_tells_right_from_wrong():
    rng = np.random.default_rng(0)

    def sample(n, easy):
        is_right = rng.random(n) < easy
        sharp = np.where(is_right, rng.uniform(3, 5, n), rng.uniform(0.1, 1, n))
        logits = np.zeros((n, 3))
        logits[:, 0] = sharp
        return logits, np.where(is_right, 0, 1)

    source, labels = sample(500, 0.9)
    target, target_labels = sample(400, 0.6)
    for score in ("confidence", "entropy"):
        found = average_thresholded_confidence(source, labels, target, score=score)
        assert found.value == pytest.approx(accuracy(target, target_labels), abs=1e-12)
        assert found.low < found.value < found.high
    # On the source itself it predicts the source's accuracy, right and wrong mixed as they may be.
    mixed, mixed_labels = classified(rng, 300, 2.0)
    assert average_thresholded_confidence(mixed, mixed_labels, mixed).value == accuracy(mixed, mixed_labels)
    assert average_thresholded_confidence(mixed, 3 - mixed.argmax(1) * 0 - (mixed.argmax(1) == 3), mixed).value == 0


@pytest.mark.long
def test_intervals_cover_and_tests_have_their_level():
    rng = np.random.default_rng(0)
    # The expectations, from a sample so large that its own chance is nothing beside the intervals.
    large, large_labels = classified(rng, 200_000, 2.0)
    target, _ = classified(rng, 200_000, 1.2)
    doc = difference_of_confidences(large, large_labels, target).value
    atc = average_thresholded_confidence(large, large_labels, target).value
    covered = []
    for seed in range(100):
        source, labels = classified(rng, 400, 2.0)
        few, _ = classified(rng, 300, 1.2)
        found = (
            (difference_of_confidences(source, labels, few), doc),
            (average_thresholded_confidence(source, labels, few, seed=seed), atc),
        )
        covered.append([e.low <= truth <= e.high for e, truth in found])
    assert (np.mean(covered, 0) >= 0.88).all(), np.mean(covered, 0)
    p = [
        (confidence_drop(a, b).p_value, entropy_rise(a, b).p_value)
        for a, b in ((rng.standard_normal((60, 4)), rng.standard_normal((50, 4))) for _ in range(3000))
    ]
    np.testing.assert_allclose(np.mean(np.array(p) <= 0.05, 0), 0.05, atol=0.015)


def test_predictions_without_their_logits_give_what_the_logits_give():
    rng = np.random.default_rng(0)
    source, labels = classified(rng, 300, 3.0)
    target, target_labels = classified(rng, 200, 1.0)
    p, q = special.softmax(source, 1), special.softmax(target, 1)
    a = Predictions(p.max(1), stats.entropy(p, axis=1), source.argmax(1) == labels)
    b = Predictions(q.max(1), stats.entropy(q, axis=1), target.argmax(1) == target_labels)
    found = [measure.estimate.value for measure in compare_predictions(a, b, seed=1)]
    expected = [
        confidence_drop(source, target),
        entropy_rise(source, target),
        average_thresholded_confidence(source, labels, target, seed=1),
        difference_of_confidences(source, labels, target),
    ]
    np.testing.assert_allclose(found, [estimate.value for estimate in expected], atol=1e-6)
    with pytest.raises(InputError, match="at least two predictions"):
        compare_predictions(a, Predictions(*(values[:1] for values in b)))


def test_unusable_input_is_one_line():
    logits = np.zeros((5, 3))
    with pytest.raises(InputError, match="3 classes and the target 4"):
        confidence_drop(logits, np.zeros((5, 4)))
    with pytest.raises(InputError, match="one class"):
        entropy_rise(logits[:, :1], logits[:, :1])
    with pytest.raises(InputError, match="labels are 5 integers"):
        difference_of_confidences(logits, [0, 1], logits)
    with pytest.raises(InputError, match="labels go from 0 to 3"):
        difference_of_confidences(logits, [0, 1, 2, 3, 0], logits)
    with pytest.raises(InputError, match="unknown score"):
        average_thresholded_confidence(logits, [0] * 5, logits, score="margin")
    with pytest.raises(InputError, match="at least two"):
        confidence_drop(logits[:1], logits)
