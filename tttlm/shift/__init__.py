"""How far apart are two samples? Measures of shift between features `[N, D]`, counts of tokens, and logits.

>>> from tttlm.shift import mmd, sliced_wasserstein
>>> sliced_wasserstein(a, b)                        # Estimate(value=0.31, low=0.28, high=0.34, p_value=None)
>>> mmd(images_a, images_b, features=model.features).p_value

Every measure takes two arrays, or two sets of inputs and a callable that makes features of a batch, is a function of
its arguments and `seed` alone, and returns an `Estimate` with an interval or a p-value (`Divergences` and
`ClassifierTest` hold several). All pairs are computed in blocks: memory grows with the samples, not with their product.
`compare_samples` runs them all. Needs what the core needs; `entropic_wasserstein` also `ott-jax`.
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
from tttlm.shift.mmd import linear_time_mmd, median_width, mmd
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
    "median_width",
    "mmd",
    "nearest_neighbour_divergence",
    "sliced_wasserstein",
    "wasserstein_1d",
]
