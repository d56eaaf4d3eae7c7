"""All measures of shift on the same two samples, for the command line and reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tttlm.errors import InputError
from tttlm.shift.classifier import classifier_test
from tttlm.shift.confidence import Predictions, atc, doc, drop
from tttlm.shift.divergence import Divergences, count_divergence, gaussian_divergence, nearest_neighbour_divergence
from tttlm.shift.estimate import Estimate
from tttlm.shift.frechet import frechet_distance
from tttlm.shift.mmd import linear_time_mmd, median_bandwidth, mmd
from tttlm.shift.samples import Features, pair_of
from tttlm.shift.wasserstein import (
    columnwise_wasserstein,
    entropic_wasserstein,
    root_of,
    sliced_wasserstein,
    wasserstein_1d,
)

_SHRINKAGE = 0.05
_MANY = 20  # number of features above which a nearest neighbour is hardly nearer than any other sample


@dataclass(frozen=True)
class Measurement:
    """One line of a comparison.

    Attributes:
        name: name of the measure.
        estimate: the estimate; None if it could not be computed.
        note: why not, or a remark that is needed to interpret the estimate.
    """

    name: str
    estimate: Estimate | None
    note: str = ""


def compare_samples(
    a: Any,
    b: Any,
    *,
    features: Features | None = None,
    pairs: int = 2000,
    permutations: int = 199,
    entropic: bool = True,
    seed: int = 0,
) -> list[Measurement]:
    """Every measure of shift between two samples of features; one that cannot be computed has a note that says why.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        features: a model's features of a batch of inputs.
        pairs: the largest number of samples per side, chosen at random, for measures whose time grows with the number
            of pairs; 0 uses all samples.
        permutations: number of permutations of MMD and of the classifier tests.
        entropic: whether to compute the entropic Wasserstein distance, for which `ott-jax` has to be installed.
        seed: seed of everything random.

    Raises:
        InputError: the samples cannot be compared: not finite arrays `[N, D]` with equal D, or fewer than eight
            samples.
    """
    a, b = pair_of(a, b, features, 8)
    rng = np.random.default_rng(seed)
    few_a, few_b = (x[np.sort(rng.permutation(len(x))[:pairs])] if pairs else x for x in (a, b))
    found: list[Measurement] = []
    few_of_many = min(len(a), len(b)) < 10 * a.shape[1]

    def add(names: tuple[str, ...], measure: Callable[[], tuple[Estimate, ...]], note: str = "") -> None:
        try:
            found.extend(Measurement(name, e, note) for name, e in zip(names, measure(), strict=True))
        except InputError as error:
            found.extend(Measurement(name, None, str(error)) for name in names)

    subset = "" if len(few_a) == len(a) and len(few_b) == len(b) else f"{len(few_a):,} and {len(few_b):,} samples"
    add(
        ("KL(A||B), nearest neighbours", "KL(B||A), nearest neighbours", "Jensen-Shannon, nearest neighbours"),
        lambda: _three(nearest_neighbour_divergence(few_a, few_b, seed=seed)),
        "; ".join(filter(None, [subset, "unreliable for so many features" if a.shape[1] > _MANY else ""])),
    )
    add(
        ("KL(A||B), Gaussian", "KL(B||A), Gaussian", "Jensen-Shannon, Gaussian"),
        lambda: _three(gaussian_divergence(a, b, shrinkage=_SHRINKAGE, seed=seed)),
        f"covariance shrunk by {_SHRINKAGE:g}"
        + ("; far too large for so few samples of so many features" if few_of_many else ""),
    )
    if a.shape[1] == 1:
        add(("Wasserstein-1",), lambda: (wasserstein_1d(a, b, seed=seed),))
    add(("sliced Wasserstein-2",), lambda: (sliced_wasserstein(a, b, seed=seed),))
    if entropic:
        add(("entropic Wasserstein-2",), lambda: (entropic_wasserstein(few_a, few_b, seed=seed),), subset)
    frechet = frechet_distance(a, b, seed=seed)
    found.append(Measurement("Gaussian Wasserstein-2", root_of(frechet)))
    bias = "" if np.isnan(frechet.bias) else f"small-sample bias: about {max(frechet.bias, 0):.3g} of it"
    found.append(Measurement("Frechet distance", frechet, bias))
    add(("MMD^2, median bandwidth",), lambda: (mmd(few_a, few_b, permutations=permutations, seed=seed),), subset)

    def several_bandwidths() -> tuple[Estimate, ...]:
        bandwidths = median_bandwidth(few_a, few_b, seed=seed) * np.array([0.25, 0.5, 1, 2, 4])
        return (mmd(few_a, few_b, bandwidths=bandwidths.tolist(), permutations=permutations, seed=seed),)

    add(("MMD^2, five bandwidths",), several_bandwidths, subset)
    add(("MMD^2, linear time",), lambda: (linear_time_mmd(a, b, seed=seed),))

    def classifier(kind: Any) -> tuple[Estimate, ...]:
        test = classifier_test(a, b, classifier=kind, permutations=permutations, seed=seed)
        return test.accuracy, test.auc

    add(("accuracy of logistic classifier", "AUC of logistic classifier"), lambda: classifier("logistic"))
    add(("accuracy of MLP classifier", "AUC of MLP classifier"), lambda: classifier("mlp"))
    return found


def compare_counts(a: Any, b: Any, *, permutations: int = 199, seed: int = 0) -> list[Measurement]:
    """The divergences of token counts `[documents, V]` or `[V]`, as lines of a comparison."""
    names = ("KL(A||B), token counts", "KL(B||A), token counts", "Jensen-Shannon, token counts")
    values = _three(count_divergence(a, b, permutations=permutations, seed=seed))
    return [Measurement(name, value) for name, value in zip(names, values, strict=True)]


def compare_predictions(a: Predictions, b: Predictions, *, seed: int = 0) -> list[Measurement]:
    """The measures of a model's confidence, as lines of a comparison, with the accuracy beside its two predictions.

    Raises:
        InputError: a sample has fewer than two predictions.
    """
    if (fewest := min(len(a.right), len(b.right))) < 2:
        raise InputError(f"confidence needs at least two predictions of each sample, got {fewest}")
    note = f"it is {b.right.mean():.3f}, and {a.right.mean():.3f} on A"
    return [
        Measurement("drop of mean maximum softmax", drop(a.confidence, b.confidence)),
        Measurement("rise of mean entropy", drop(-a.entropy, -b.entropy)),
        Measurement("accuracy on B predicted by ATC", atc(-a.entropy, a.right, -b.entropy, seed), note),
        Measurement("accuracy on B predicted by DoC", doc(a.confidence, a.right, b.confidence), note),
    ]


def _three(divergences: Divergences) -> tuple[Estimate, Estimate, Estimate]:
    return divergences.forward, divergences.backward, divergences.jensen_shannon


def feature_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The difference `[D]` of each single feature: its Wasserstein-1 distance in standard deviations."""
    deviation = np.sqrt((a.var(0, dtype=np.float64) + b.var(0, dtype=np.float64)) / 2)
    distance = columnwise_wasserstein(a, b).astype(np.float64)
    return np.divide(distance, deviation, out=np.where(distance > 0, np.inf, 0.0), where=deviation > 0)
