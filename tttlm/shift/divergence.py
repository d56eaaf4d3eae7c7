"""Kullback-Leibler divergence in both directions and Jensen-Shannon divergence, in nats.

There are three estimators: by nearest neighbours for continuous features, for Gaussians, and for token counts.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from tttlm.errors import InputError
from tttlm.shift.distances import nearest
from tttlm.shift.estimate import GROUPS, Estimate, apart_error, jackknife_error, split_into_groups, t_interval
from tttlm.shift.moments import Gaussian, Moments
from tttlm.shift.samples import Features, centred, pair_of

_PERMUTATIONS_AT_ONCE = 100


@dataclass(frozen=True)
class Divergences:
    """Divergences of the distributions of two samples, in nats.

    Attributes:
        forward: KL(A || B), the mean over A of `log a(x) / b(x)`.
        backward: KL(B || A).
        jensen_shannon: mean of the divergences of A and of B from their even mixture, between 0 and log 2.
    """

    forward: Estimate
    backward: Estimate
    jensen_shannon: Estimate


def nearest_neighbour_divergence(
    a: Any, b: Any, *, k: int = 3, features: Features | None = None, seed: int = 0
) -> Divergences:
    """Divergences of continuous features from the distances to nearest neighbours; no density is fitted.

    With `rho` the distance of a sample of A to its `k`-th neighbour in A, and `nu` to its `k`-th in B (Wang, Kulkarni
    and Verdu 2009, eq. 5), `KL(A || B) = D/N sum_i log(nu_i / rho_i) + log(M / (N - 1))`. Jensen-Shannon is the mutual
    information between a sample and its label A or B, by the estimator of Ross (2014), here with equal weight for both
    samples whatever their sizes. Both are biased towards zero, the more so the more features there are and the further
    apart the samples are; intervals cover sampling error and not this bias.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        k: the neighbour that is used; a larger k lowers the variance and raises the bias.
        features: a model's features of a batch of inputs.
        seed: seed of the parts of the samples for the intervals.

    Raises:
        InputError: too few samples; or a sample that occurs more than `k` times, because this is for continuous
            features.
    """
    if k < 1:
        raise InputError(f"k is the index of a neighbour, at least 1, got {k}")
    a, b = centred(*pair_of(a, b, features, k + 1))
    values = _nearest_neighbour(a, b, k)
    errors, degrees = apart_error(lambda x, y: _nearest_neighbour(x, y, k), a, b, max(4 * k, 20), seed)
    errors = np.broadcast_to(errors, 3)
    return Divergences(*(t_interval(v, e, degrees) for v, e in zip(values, errors, strict=True)))


def _nearest_neighbour(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    kl, js = [], []
    for x, y in ((a, b), (b, a)):
        n, m = len(x), len(y)
        rho = nearest(x, x, k, same=True)[0][:, -1].astype(np.float64)
        to_others, within = nearest(x, y, k, radius=rho)
        nu = to_others[:, -1].astype(np.float64)
        if repeated := np.count_nonzero(np.minimum(rho, nu) == 0):
            raise InputError(
                f"{repeated} samples have at least {k} copies; divergence by nearest neighbours is for "
                "continuous features, so remove copies or raise k"
            )
        kl.append(x.shape[1] * np.mean(np.log(nu / rho)) + np.log(m / (n - 1)))
        # The neighbours within rho if both samples had equal sizes.
        others = within * (n / m)
        js.append(np.mean(special.psi(k) - special.psi(k + others)) + special.psi(2 * n) - special.psi(n))
    return np.array([*kl, np.mean(js)])


def gaussian_divergence(
    a: Any,
    b: Any,
    *,
    shrinkage: float = 0.0,
    draws: int = 1024,
    features: Features | None = None,
    seed: int = 0,
) -> Divergences:
    """Divergences of the Gaussians with the samples' means and covariances.

    `KL(A || B) = 1/2 (tr(S_B^-1 S_A) + (m_B - m_A)^T S_B^-1 (m_B - m_A) - D + log det S_B / det S_A)`. Jensen-Shannon
    has no closed form and is a Monte Carlo estimate with `draws` points of each Gaussian. The value is biased upwards,
    by about `D^2 / 4 (1/N + 1/M)` without shift; intervals are by the delete-a-group jackknife.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        shrinkage: fraction of the covariance that is replaced by a multiple of the identity; needed if there are fewer
            samples than features.
        draws: number of points drawn from each Gaussian for Jensen-Shannon.
        features: a model's features of a batch of inputs.
        seed: seed of the draws and the groups.

    Raises:
        InputError: a covariance is singular.
    """
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage is a fraction between 0 and 1, got {shrinkage}")
    a, b = pair_of(a, b, features, 3)
    of_a, of_b = Moments(a, seed, shrinkage=shrinkage), Moments(b, seed + 1, shrinkage=shrinkage)
    noise = np.random.default_rng(seed).standard_normal((2, a.shape[1], draws))
    values = _gaussian(of_a.gaussian(), of_b.gaussian(), noise)
    errors = np.full(3, np.nan)
    groups = min(len(of_a), len(of_b))
    if groups == GROUPS:
        with contextlib.suppress(InputError):  # too few samples when a group is left out: no interval
            errors = jackknife_error(
                np.array([_gaussian(of_a.without(g), of_b.without(g), noise) for g in range(groups)])
            )
    return Divergences(*(t_interval(v, e, groups - 1) for v, e in zip(values, errors, strict=True)))


def _gaussian(a: Gaussian, b: Gaussian, noise: np.ndarray) -> np.ndarray:
    kl, js = [], []
    for own, other, z in ((a, b, noise[0]), (b, a, noise[1])):
        # A point m + L z of one Gaussian is ratio z + gap in the coordinates in which the other is standard normal.
        factor, of_other = own.cholesky(), other.cholesky()
        ratio = np.linalg.solve(of_other, factor)
        gap = np.linalg.solve(of_other, own.mean - other.mean)
        log_det = np.sum(np.log(np.diag(of_other)) - np.log(np.diag(factor)))
        kl.append((np.sum(ratio**2) + gap @ gap - len(gap)) / 2 + log_det)
        log_ratio = (np.sum((ratio @ z + gap[:, None]) ** 2, 0) - np.sum(z**2, 0)) / 2 + log_det  # log own / other
        js.append(np.log(2) - np.mean(np.logaddexp(0, -log_ratio)))
    return np.array([*kl, np.mean(js)])


def count_divergence(a: Any, b: Any, *, smoothing: float = 0.5, permutations: int = 199, seed: int = 0) -> Divergences:
    """Divergences of the distributions of tokens, or of any other counts.

    The probability of token `v` is `(count_v + smoothing) / (total + smoothing V)`. The value is biased upwards,
    because rare tokens differ by chance. Counts by document therefore also have a p-value for Jensen-Shannon from
    random assignments of documents to the two samples, which keep the tokens of a document together. Their intervals
    are by the jackknife over groups of documents; counts of complete samples have the interval of independent tokens,
    which is too narrow for text.

    Args:
        a, b: counts `[documents, V]`, or `[V]` of the complete sample.
        smoothing: constant added to every count; with 0 a divergence can be infinite.
        permutations: number of random assignments of the documents; 0 skips the p-value.
        seed: seed of permutations and groups.

    Raises:
        InputError: negative or non-finite counts, nothing counted, or vocabularies of different sizes.
    """
    if smoothing < 0:
        raise InputError(f"smoothing cannot be negative, got {smoothing}")
    a, b = _checked_counts(a, "A"), _checked_counts(b, "B")
    if a.shape[-1] != b.shape[-1]:
        raise InputError(f"A counts {a.shape[-1]} tokens and B {b.shape[-1]}; count over one vocabulary")
    if a.ndim != b.ndim:
        raise InputError(
            f"counts are [documents, V] for both samples or [V] for both, got shapes {a.shape} and {b.shape}"
        )
    if a.ndim == 1:
        return _counted_divergence(a, b, smoothing)
    values = _count_values(a.sum(0), b.sum(0), smoothing)
    groups, errors = min(GROUPS, len(a), len(b)), np.full(3, np.nan)
    if groups >= 4:
        rng = np.random.default_rng(seed)
        parts = [split_into_groups(len(x), groups, rng) for x in (a, b)]
        left_out = [[x.sum(0) - x[part].sum(0) for part in of_x] for x, of_x in zip((a, b), parts, strict=True)]
        if all(counts.sum() for counts in (*left_out[0], *left_out[1])):
            errors = jackknife_error(np.array([_count_values(x, y, smoothing) for x, y in zip(*left_out, strict=True)]))
    p_value = _count_test(a, b, values[2], smoothing, permutations, seed) if permutations else None
    p_values = (None, None, p_value)
    return Divergences(*(t_interval(v, e, groups - 1, p) for v, e, p in zip(values, errors, p_values, strict=True)))


def _checked_counts(counts: Any, name: str) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim not in (1, 2) or 0 in counts.shape or counts.dtype.kind not in "iufb":
        raise InputError(
            f"counts of {name} are numbers [documents, V] or [V], got shape {counts.shape}, {counts.dtype}"
        )
    counts = counts.astype(np.float64)
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise InputError(f"counts of {name} contain a negative or non-finite number")
    if not counts.sum():
        raise InputError(f"counts of {name} are all zero; nothing was counted")
    return counts


def _probabilities(a: np.ndarray, b: np.ndarray, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    p, q = a + smoothing, b + smoothing
    return p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


def _count_values(a: np.ndarray, b: np.ndarray, smoothing: float) -> np.ndarray:
    """Both directions and Jensen-Shannon `[3, ...]` of counts `[..., V]`."""
    p, q = _probabilities(a, b, smoothing)
    m = (p + q) / 2
    js = (special.rel_entr(p, m) + special.rel_entr(q, m)).sum(-1) / 2
    return np.stack([special.rel_entr(p, q).sum(-1), special.rel_entr(q, p).sum(-1), js])


def _count_test(a: np.ndarray, b: np.ndarray, observed: float, smoothing: float, permutations: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    documents, total = np.concatenate([a, b]), a.sum(0) + b.sum(0)
    reached = 0
    for start in range(0, permutations, _PERMUTATIONS_AT_ONCE):
        in_a = np.zeros((min(_PERMUTATIONS_AT_ONCE, permutations - start), len(documents)))
        in_a[:, : len(a)] = 1
        chosen = rng.permuted(in_a, axis=1) @ documents
        # Without smoothing, a sample without tokens has no distribution: NaN, which counts as reaching the value.
        with np.errstate(invalid="ignore"):
            values = _count_values(chosen, total - chosen, smoothing)[2]
        reached += int(np.count_nonzero(~(values < observed * (1 - 1e-12))))
    return (1 + reached) / (1 + permutations)


def _counted_divergence(a: np.ndarray, b: np.ndarray, smoothing: float) -> Divergences:
    """Divergences of counts of complete samples: intervals by the delta method for independent tokens."""
    p, q = _probabilities(a, b, smoothing)
    values = _count_values(a, b, smoothing)
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        # The derivatives of each divergence with respect to p and to q.
        slopes = [
            (np.log(p / q), -p / q),
            (-q / p, np.log(q / p)),
            (np.log(p / m) / 2, np.log(q / m) / 2),
        ]
        errors = [np.sqrt(_variance(p, by_p) / a.sum() + _variance(q, by_q) / b.sum()) for by_p, by_q in slopes]
    return Divergences(*(t_interval(v, e, np.inf) for v, e in zip(values, errors, strict=True)))


def _variance(p: np.ndarray, slope: np.ndarray) -> float:
    slope = np.where(p > 0, slope, 0)
    mean = p @ slope
    return p @ (slope - mean) ** 2
