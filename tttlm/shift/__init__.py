"""Measures of distribution shift between two samples of features `[N, D]`, token counts, or logits.

>>> from tttlm.shift import mmd, sliced_wasserstein
>>> sliced_wasserstein(a, b)                        # Estimate(value=0.31, low=0.28, high=0.34, p_value=None)
>>> mmd(images_a, images_b, features=model.features).p_value

Every measure takes two arrays, or two sets of inputs and a callable that computes features of a batch, depends on its
arguments and `seed` alone, and returns an `Estimate` with an interval or a p-value (`Divergences` and `ClassifierTest`
have several). Pairwise distances are computed in blocks: memory grows with the number of samples, not with its square.
`compare_samples` runs all measures. Only `entropic_wasserstein` needs an extra package, `ott-jax`.
"""

from tttlm.shift.classifier import ClassifierTest, classifier_test
from tttlm.shift.confidence import (
    average_thresholded_confidence,
    confidence_drop,
    difference_of_confidences,
    entropy_rise,
)
from tttlm.shift.divergence import (
    Divergences,
    count_divergence,
    gaussian_divergence,
    nearest_neighbour_divergence,
)
from tttlm.shift.estimate import Estimate
from tttlm.shift.frechet import FrechetEstimate, frechet_distance
from tttlm.shift.mmd import linear_time_mmd, median_bandwidth, mmd
from tttlm.shift.panel import Measurement, compare_counts, compare_samples
from tttlm.shift.samples import Features, features_of
from tttlm.shift.wasserstein import (
    entropic_wasserstein,
    gaussian_wasserstein,
    sliced_wasserstein,
    wasserstein_1d,
)

__all__ = [
    "ClassifierTest",
    "Divergences",
    "Estimate",
    "Features",
    "FrechetEstimate",
    "Measurement",
    "average_thresholded_confidence",
    "classifier_test",
    "compare_counts",
    "compare_samples",
    "confidence_drop",
    "count_divergence",
    "difference_of_confidences",
    "entropic_wasserstein",
    "entropy_rise",
    "features_of",
    "frechet_distance",
    "gaussian_divergence",
    "gaussian_wasserstein",
    "linear_time_mmd",
    "median_bandwidth",
    "mmd",
    "nearest_neighbour_divergence",
    "sliced_wasserstein",
    "wasserstein_1d",
]
