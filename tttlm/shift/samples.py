"""The two samples of a measure as checked `[N, D]` arrays, from any arrays or from inputs and a feature function."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tttlm.errors import InputError

Features = Callable[[Any], Any]
"""A function from a batch of inputs `[B, ...]` to features `[B, D]`."""


def features_of(
    samples: Any, features: Features | None = None, *, name: str = "the sample", batch_size: int = 256
) -> np.ndarray:
    """The features `[N, D]` of one sample, in float64 if JAX has it enabled and float32 otherwise.

    Args:
        samples: array `[N, D]`, or `[N]` for one feature; with `features`, anything that has a length and can be
            sliced.
        features: called with `batch_size` samples at a time, the last batch being smaller; None uses the samples
            themselves as features.
        name: the name of the sample in errors.

    Raises:
        InputError: the features are not an `[N, D]` array of numbers, or some are not finite.
    """
    if features is not None:
        if not len(samples):
            raise InputError(f"{name} is empty; give at least one input")
        batches = range(0, len(samples), batch_size)
        samples = np.concatenate([np.asarray(features(samples[i : i + batch_size])) for i in batches])
    array = np.asarray(samples)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} has shape {array.shape}; features are [N, D], so flatten or extract them first")
    try:
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64), copy=False)
    except (TypeError, ValueError):
        raise InputError(f"{name} has dtype {array.dtype}; features are numbers") from None
    if not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array).all(1))
        raise InputError(f"{name} has NaN or infinite features in {len(rows)} of {len(array)} samples, first {rows[0]}")
    return array


def pair_of(a: Any, b: Any, features: Features | None, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """The features of both samples.

    Raises:
        InputError: as `features_of`; the samples have different numbers of features, or one has fewer than `smallest`
            samples.
    """
    a, b = features_of(a, features, name="sample A"), features_of(b, features, name="sample B")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"A has {a.shape[1]} features and B has {b.shape[1]}; they must be the same features")
    for name, sample in (("A", a), ("B", b)):
        if len(sample) < smallest:
            raise InputError(f"sample {name} has {len(sample)} samples; this measure needs at least {smallest}")
    return a, b


def centred(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both samples minus their common mean, so that distances are not lost in rounding."""
    mean = (a.sum(0, dtype=np.float64) + b.sum(0, dtype=np.float64)) / (len(a) + len(b))
    return a - mean.astype(a.dtype), b - mean.astype(b.dtype)
