"""Wasserstein and Frechet distances: closed forms, scipy, exact transport, invariances, bias and coverage."""

import builtins

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, optimize, stats

from tttlm.errors import InputError
from tttlm.shift import (
    entropic_wasserstein,
    frechet_distance,
    gaussian_wasserstein,
    sliced_wasserstein,
    wasserstein_1d,
)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_one_dimension_is_that_of_scipy(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal(n), rng.standard_normal(m) * 3
    assert wasserstein_1d(a, b).value == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_any_order_and_sizes_are_those_of_repeated_samples(order, x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(6), rng.standard_normal(4) + 1
    gaps = np.abs(np.sort(np.repeat(a, 2)) - np.sort(np.repeat(b, 3)))
    expected = np.mean(gaps**order) ** (1 / order)
    assert wasserstein_1d(a, b, order=order).value == pytest.approx(expected, rel=1e-12)
    assert wasserstein_1d(b, a, order=order).value == pytest.approx(expected, rel=1e-12)
    assert wasserstein_1d(3 * a + 7, 3 * b + 7, order=order).value == pytest.approx(3 * expected, rel=1e-12)
    assert wasserstein_1d(a, a, order=order).value == pytest.approx(0, abs=1e-12)


def test_sliced_distance_of_a_shift_is_its_closed_form():
    rng = np.random.default_rng(0)
    a, shift = rng.standard_normal((300, 6)), np.array([3, 0, -4, 0, 0, 0])
    found = sliced_wasserstein(a, a + shift, directions=2000)
    assert found.value == pytest.approx(5 / np.sqrt(6), rel=0.03)
    assert found.low < 5 / np.sqrt(6) < found.high


def test_sliced_distance_averages_the_exact_ones(x64):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((50, 3)), rng.standard_normal((31, 3)) + 1
    axes = np.random.default_rng(5).standard_normal((3, 20))
    axes /= np.linalg.norm(axes, axis=0)
    each = [wasserstein_1d(a @ w, b @ w, order=2).value ** 2 for w in axes.T]
    assert sliced_wasserstein(a, b, directions=20, seed=5).value == pytest.approx(np.sqrt(np.mean(each)), rel=1e-10)


@pytest.mark.long
def test_entropic_distance_becomes_the_exact_one(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 2)), rng.standard_normal((40, 2)) + np.array([2, 0])
    costs = np.sum((a[:, None] - b[None]) ** 2, -1)
    exact = np.sqrt(costs[optimize.linear_sum_assignment(costs)].mean())
    assert entropic_wasserstein(a, b, epsilon=0.01).value == pytest.approx(exact, rel=0.02)
    # With much entropy it is the distance of the means; batches of the costs change nothing.
    means = np.linalg.norm(a.mean(0) - b.mean(0))
    assert entropic_wasserstein(a, b, epsilon=1e4).value == pytest.approx(means, rel=1e-3)
    whole = entropic_wasserstein(a, b).value
    assert entropic_wasserstein(a, b, batch_size=8).value == pytest.approx(whole, rel=1e-6)
    assert entropic_wasserstein(a + 5, b + 5).value == pytest.approx(whole, rel=1e-6)
    assert entropic_wasserstein(a, a).value == pytest.approx(0, abs=1e-3)


def test_without_ott_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name in ("ott", "tttlm.shift.transport"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'tttlm\[shift\]'"):
        entropic_wasserstein(np.zeros((5, 1)), np.ones((5, 1)))


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_frechet_distance_is_its_formula(d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((30, d)), rng.standard_normal((40, d)) @ rng.standard_normal((d, d)) + 1
    cov_a, cov_b = np.cov(a.T).reshape(d, d), np.cov(b.T).reshape(d, d)
    root = linalg.sqrtm(cov_a @ cov_b)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * np.real(root))
    assert frechet_distance(a, b).value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert gaussian_wasserstein(b, a).value == pytest.approx(np.sqrt(expected), rel=1e-3, abs=1e-2)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    assert frechet_distance(a @ turn - 3, b @ turn - 3).value == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_frechet_of_few_samples_of_many_features_is_finite():
    a = np.random.default_rng(0).standard_normal((60, 100))
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-2)
    assert frechet_distance(a, a + 1).value == pytest.approx(100, rel=1e-3)


def test_the_bias_of_few_samples_is_found():
    rng = np.random.default_rng(0)
    found = [frechet_distance(*rng.standard_normal((2, 150, 10)), seed=seed) for seed in range(40)]
    plain, corrected = np.mean([f.value for f in found]), np.mean([f.value - f.bias for f in found])
    assert plain > 0.25  # there is no shift, and the distance is 0
    assert abs(corrected) < plain / 5


@pytest.mark.long
def test_intervals_cover():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(60):
        a, b = rng.standard_normal((400, 3)), rng.standard_normal((500, 3)) + 1
        found = [
            (wasserstein_1d(a[:, 0], b[:, 0], seed=seed), 1.0),
            (sliced_wasserstein(a, b, seed=seed, directions=64), 1.0),
            (gaussian_wasserstein(a, b, seed=seed), np.sqrt(3)),
            (frechet_distance(a, b, seed=seed), 3.0),
        ]
        covered.append([e.low <= truth <= e.high for e, truth in found])
    assert (np.mean(covered, 0) >= 0.85).all(), np.mean(covered, 0)


def test_unusable_input_is_one_line():
    a = np.zeros((5, 2))
    with pytest.raises(InputError, match="one feature, got 2"):
        wasserstein_1d(a, a)
    with pytest.raises(InputError, match="order"):
        sliced_wasserstein(a, a, order=0.5)
    with pytest.raises(InputError, match="directions"):
        sliced_wasserstein(a, a, directions=0)
    with pytest.raises(InputError, match="epsilon"):
        entropic_wasserstein(a, a, epsilon=-1.0)
