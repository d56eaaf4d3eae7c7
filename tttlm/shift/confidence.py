"""Measures of shift from a classifier's confidence: its drop, and the accuracy on unlabelled data predicted from it.

All take logits `[N, C]`; log-probabilities are logits too. The source is labelled data on which the classifier does
well; the target needs no labels.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special

from tttlm.errors import InputError
from tttlm.shift.estimate import CONFIDENCE, Estimate, normal_interval, t_interval
from tttlm.shift.samples import Features, features_of

_BOOTSTRAPS = 500
Score = Literal["confidence", "entropy"]


class Predictions(NamedTuple):
    """What the measures of this file need of the predictions for one sample, for a classifier of too many classes to
    keep all logits.

    Attributes:
        confidence: The largest probability of each prediction, float `[N]`.
        entropy: The entropy of each prediction in nats, float `[N]`.
        right: Whether the likeliest class is the label, bool `[N]`.
    """

    confidence: np.ndarray
    entropy: np.ndarray
    right: np.ndarray


def confidence_drop(source: Any, target: Any, *, logits: Features | None = None) -> Estimate:
    """Mean of the largest softmax probability on the source less that on the target; Welch's interval and p-value.

    Args:
        source, target: logits `[N, C]` and `[M, C]`, or inputs for `logits`.
        logits: a classifier's logits of a batch of inputs.

    Raises:
        InputError: logits of different numbers of classes, fewer than two samples, or NaN.
    """
    source, target = _pair_of_logits(source, target, logits)
    return drop(_scores(source, "confidence"), _scores(target, "confidence"))


def entropy_rise(source: Any, target: Any, *, logits: Features | None = None) -> Estimate:
    """Mean entropy of the softmax, in nats, on the target less that on the source; Welch's interval and p-value.

    Arguments and errors are those of `confidence_drop`.
    """
    source, target = _pair_of_logits(source, target, logits)
    return drop(_scores(source, "entropy"), _scores(target, "entropy"))


def average_thresholded_confidence(
    source: Any,
    labels: Any,
    target: Any,
    *,
    score: Score = "entropy",
    logits: Features | None = None,
    seed: int = 0,
) -> Estimate:
    """Accuracy on the target predicted by ATC (Garg et al. 2022, arXiv 2201.04234).

    The threshold is chosen so that the fraction of source samples that score below it is the source error; the
    prediction is the fraction of target samples that score above it. The bootstrap interval covers sampling error, but
    not a shift that changes accuracy and confidence differently.

    Args:
        source: logits `[N, C]` of labelled data from the source, which the classifier was not trained on.
        labels: classes of the source, int `[N]`.
        target: logits `[M, C]`.
        score: "entropy" takes the negative entropy, the better one in the paper; "confidence" the largest probability.
        logits: a classifier's logits of a batch of inputs.
        seed: seed of the bootstrap.

    Raises:
        InputError: as `confidence_drop`; labels that do not match the logits; an unknown score.
    """
    if score not in ("confidence", "entropy"):
        raise InputError(f"unknown score {score!r}; there are 'confidence' and 'entropy'")
    source, target = _pair_of_logits(source, target, logits)
    return atc(_scores(source, score), _right(source, labels), _scores(target, score), seed)


def atc(of_source: np.ndarray, right: np.ndarray, of_target: np.ndarray, seed: int) -> Estimate:
    """`average_thresholded_confidence` of scores `[N]` and `[M]`, larger where the classifier is more confident, and of
    whether it was right on the source, bool `[N]`."""
    of_target = np.sort(of_target)
    value = _thresholded(of_source, right, of_target)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(_BOOTSTRAPS):
        drawn = rng.integers(0, len(of_source), len(of_source))
        # The count above a threshold of a resample of the target is binomial.
        fraction = _thresholded(of_source[drawn], right[drawn], of_target)
        values.append(rng.binomial(len(of_target), fraction) / len(of_target))
    tail = (1 - CONFIDENCE) / 2
    return Estimate(value, float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail)))


def difference_of_confidences(source: Any, labels: Any, target: Any, *, logits: Features | None = None) -> Estimate:
    """Accuracy on the target predicted by the difference of confidences (Guillory et al. 2021, arXiv 2107.03315).

    It is the source accuracy minus the drop in mean confidence, which is correct if confidence falls as accuracy does.
    Arguments and errors are those of `average_thresholded_confidence`.
    """
    source, target = _pair_of_logits(source, target, logits)
    return doc(_scores(source, "confidence"), _right(source, labels), _scores(target, "confidence"))


def doc(of_source: np.ndarray, right: np.ndarray, of_target: np.ndarray) -> Estimate:
    """`difference_of_confidences` of the largest probabilities `[N]` and `[M]`, and of whether the classifier was right
    on the source, bool `[N]`."""
    overconfidence = right - of_source
    error = np.sqrt(overconfidence.var(ddof=1) / len(of_source) + of_target.var(ddof=1) / len(of_target))
    return normal_interval(overconfidence.mean() + of_target.mean(), float(error))


def _pair_of_logits(source: Any, target: Any, logits: Features | None) -> tuple[np.ndarray, np.ndarray]:
    source = features_of(source, logits, name="the source").astype(np.float64)
    target = features_of(target, logits, name="the target").astype(np.float64)
    if source.shape[1] != target.shape[1]:
        raise InputError(f"the source has {source.shape[1]} classes and the target {target.shape[1]}")
    if source.shape[1] < 2:
        raise InputError("logits of one class have no confidence; give [N, C] with at least two classes")
    if min(len(source), len(target)) < 2:
        raise InputError(f"the source has {len(source)} samples and the target {len(target)}; give at least two each")
    return source, target


def _scores(logits: np.ndarray, score: Score) -> np.ndarray:
    """The largest probability, or the negative entropy: larger where the classifier is more confident."""
    log_p = special.log_softmax(logits, 1)
    return np.exp(log_p.max(1)) if score == "confidence" else np.sum(np.exp(log_p) * log_p, 1)


def _right(logits: np.ndarray, labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (len(logits),) or labels.dtype.kind not in "iu":
        raise InputError(f"labels are {len(logits)} integers, got shape {labels.shape} of {labels.dtype}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InputError(f"labels go from {labels.min()} to {labels.max()}, but there are {logits.shape[1]} classes")
    return logits.argmax(1) == labels


def drop(source: np.ndarray, target: np.ndarray) -> Estimate:
    """Mean of the source minus that of the target, with a one-sided p-value against no drop."""
    value = source.mean() - target.mean()
    squares = np.array([x.var(ddof=1) / len(x) for x in (source, target)])
    error = np.sqrt(squares.sum())
    if not error > 0:
        return t_interval(value, 0.0, 1, p_value=float(value <= 0))
    degrees = squares.sum() ** 2 / np.sum(squares**2 / [len(source) - 1, len(target) - 1])
    return t_interval(value, float(error), degrees, float(special.stdtr(degrees, -value / error)))


def _thresholded(source: np.ndarray, right: np.ndarray, target: np.ndarray) -> float:
    """Fraction of the sorted target above the threshold, below which the fraction of the source is the source error."""
    wrong = int(np.count_nonzero(~right))
    if wrong == len(source):
        return 0.0
    threshold = np.partition(source, wrong)[wrong]  # `wrong` scores are below it
    return float(1 - np.searchsorted(target, threshold, "left") / len(target))
