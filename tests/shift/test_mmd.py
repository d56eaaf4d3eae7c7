"""MMD: its definition written out, the level and power of its tests, what must not matter."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from tttlm.errors import InputError
from tttlm.shift import linear_time_mmd, median_bandwidth, mmd


def by_definition(a, b, bandwidths) -> float:
    def kernel(x, y):
        return np.mean([np.exp(-cdist(x, y, "sqeuclidean") / (2 * w**2)) for w in bandwidths], 0)

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()


@pytest.mark.parametrize("bandwidths", [0.7, [0.3, 1.0, 5.0]])
def test_the_value_is_its_definition(bandwidths, x64, monkeypatch):
    from tttlm.shift import distances

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((33, 4)), rng.standard_normal((21, 4)) + 0.4
    expected = by_definition(a, b, np.atleast_1d(bandwidths))
    assert mmd(a, b, bandwidths=bandwidths).value == pytest.approx(expected, abs=1e-12)
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert mmd(b @ turn + 9, a @ turn + 9, bandwidths=bandwidths).value == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(distances, "ROWS", 16)
    monkeypatch.setattr(distances, "COLUMNS", 7)
    assert mmd(a, b, bandwidths=bandwidths).value == pytest.approx(expected, abs=1e-12)
    assert mmd(a, b, bandwidths=bandwidths).p_value == mmd(a, b, bandwidths=bandwidths).p_value


def test_the_median_bandwidth_is_the_median_distance(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 3)), rng.standard_normal((30, 3))
    expected = np.median(pdist(np.concatenate([a, b])))
    assert median_bandwidth(a, b) == pytest.approx(expected, rel=1e-12)
    assert mmd(a, b).value == pytest.approx(by_definition(a, b, [expected]), abs=1e-12)
    # So units do not matter.
    assert mmd(1000 * a, 1000 * b).value == pytest.approx(mmd(a, b).value, abs=1e-12)


def test_the_p_value_is_that_of_permutations_done_one_by_one(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((15, 2)), rng.standard_normal((12, 2)) + 0.4
    pooled = np.concatenate([a, b])
    seeded = np.random.default_rng(7)
    values = []
    for sides in seeded.permuted(np.repeat([[1.0] * 15 + [0.0] * 12], 99, 0), axis=1):
        order = np.argsort(-sides, kind="stable")
        values.append(by_definition(pooled[order[:15]], pooled[order[15:]], [1.0]))
    expected = (1 + np.sum(np.array(values) >= by_definition(a, b, [1.0]))) / 100
    assert 0.01 < expected < 0.5
    assert mmd(a, b, bandwidths=1.0, permutations=99, seed=7).p_value == expected


def test_the_linear_time_mean_is_unbiased(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60_000, 2)), rng.standard_normal((60_000, 2)) + 1
    found = linear_time_mmd(a, b, bandwidths=1.0)
    # E k of Gaussians: (1 + 2 s^2 / w^2)^(-D/2) exp(-|c|^2 / (2 (w^2 + 2 s^2))), with w = s = 1
    expected = 2 / 3 * (1 - np.exp(-2 / 6))
    assert found.low < expected < found.high
    assert found.value == pytest.approx(expected, abs=0.02)
    assert found.p_value < 1e-10


def rejections(test, a, b, draws) -> float:
    return float(np.mean([test(a(), b(), seed=i).p_value <= 0.05 for i in range(draws)]))


def normal(rng, n, shift=0.0, d=2):
    return lambda: rng.standard_normal((n, d)) + shift


def permutation_test(a, b, seed):
    return mmd(a, b, permutations=99, seed=seed)


def linear_test(a, b, seed):
    return linear_time_mmd(a, b, bandwidths=1.0, seed=seed)


@pytest.mark.long
def test_under_no_shift_five_per_cent_are_rejected():
    rng = np.random.default_rng(0)
    assert rejections(permutation_test, normal(rng, 20), normal(rng, 25), 2000) == pytest.approx(0.05, abs=0.015)
    # Neither Gaussian nor continuous: coins, nearly all values occur many times.
    coins = lambda: rng.integers(0, 2, (20, 3)).astype(float)
    assert rejections(permutation_test, coins, coins, 1500) == pytest.approx(0.05, abs=0.015)
    assert rejections(linear_test, normal(rng, 200), normal(rng, 200), 2000) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("test", "n"), [(permutation_test, 20), (linear_test, 400)])
def test_power_grows_with_shift_and_samples(test, n):
    rng = np.random.default_rng(0)
    of_shift = [rejections(test, normal(rng, n), normal(rng, n, s), 100) for s in (0.2, 0.6, 1.2)]
    of_size = [rejections(test, normal(rng, m), normal(rng, m, 0.5), 100) for m in (n // 2, 2 * n, 6 * n)]
    for power in (of_shift, of_size):
        assert power[0] < power[1] - 0.1 < power[2] - 0.2
    assert of_shift[2] > 0.9


def test_it_sees_what_leaves_mean_and_covariance_alone():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (200, 1))
    assert mmd(rng.standard_normal((200, 1)), signs).p_value <= 0.005


def test_unusable_input_is_one_line():
    a = np.zeros((5, 2))
    with pytest.raises(InputError, match="the same; there is no distance"):
        mmd(a, a)
    with pytest.raises(InputError, match="bandwidths"):
        mmd(a, a + 1, bandwidths=[1.0, 0.0])
