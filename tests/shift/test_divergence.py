"""Divergences: closed forms, other implementations, what must not matter, and how often they are wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.spatial.distance import jensenshannon

from tttlm.errors import InputError
from tttlm.shift import count_divergence, gaussian_divergence, nearest_neighbour_divergence


def three(divergences) -> np.ndarray:
    return np.array([divergences.forward.value, divergences.backward.value, divergences.jensen_shannon.value])


def rotation(rng, d) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def numeric(p, q, points) -> np.ndarray:
    """KL in both directions and Jensen-Shannon of two densities on a line."""
    kl = lambda p, q: integrate.quad(lambda x: p(x) * (np.log(p(x)) - np.log(q(x))), *points, limit=200)[0]
    m = lambda x: (p(x) + q(x)) / 2
    return np.array([kl(p, q), kl(q, p), (kl(p, m) + kl(q, m)) / 2])


@pytest.mark.long
def test_nearest_neighbours_find_the_divergence_of_known_densities():
    rng = np.random.default_rng(0)
    p, q = stats.norm(0, 1), stats.norm(0.8, 1.2)
    a, b = p.rvs(2000, random_state=rng), q.rvs(1500, random_state=rng)
    truth = numeric(p.pdf, q.pdf, (-12, 12))
    np.testing.assert_allclose(three(nearest_neighbour_divergence(a, b)), truth, atol=0.05)
    # In three dimensions: KL of a shift c is |c|^2 / 2.
    a, b = rng.standard_normal((1500, 3)), rng.standard_normal((1500, 3)) + 0.5
    np.testing.assert_allclose(three(nearest_neighbour_divergence(a, b))[:2], 0.375, atol=0.07)


def test_nearest_neighbours_are_those_of_scikit_learn(x64):
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(1)
    a, b, k = rng.standard_normal((150, 3)), rng.standard_normal((90, 3)) * 1.5 + 0.3, 4
    rho = NearestNeighbors(n_neighbors=k).fit(a).kneighbors()[0][:, -1]
    nu = NearestNeighbors(n_neighbors=k).fit(b).kneighbors(a)[0][:, -1]
    expected = 3 * np.mean(np.log(nu / rho)) + np.log(90 / 149)
    assert nearest_neighbour_divergence(a, b, k=k).forward.value == pytest.approx(expected, abs=1e-9)
    # With samples of one size, Jensen-Shannon is the mutual information of sample and feature.
    a, b = rng.standard_normal(120), rng.standard_normal(120) + 1
    labels = np.repeat([0, 1], 120)
    expected = mutual_info_classif(np.concatenate([a, b])[:, None], labels, n_neighbors=k, random_state=0)[0]
    assert nearest_neighbour_divergence(a, b, k=k).jensen_shannon.value == pytest.approx(expected, abs=1e-6)


def test_nearest_neighbours_do_not_see_rotation_scale_and_place(x64):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((80, 4)), rng.standard_normal((70, 4)) + 1
    moved = [7 * x @ rotation(np.random.default_rng(3), 4) + 1000 for x in (a, b)]
    before, after = nearest_neighbour_divergence(a, b), nearest_neighbour_divergence(*moved)
    np.testing.assert_allclose(three(after), three(before), atol=1e-8)
    swapped = nearest_neighbour_divergence(b, a)
    np.testing.assert_allclose(three(swapped), three(before)[[1, 0, 2]], atol=1e-9)


def test_blocks_change_nothing(monkeypatch):
    from tttlm.shift import distances

    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((50, 3)), rng.standard_normal((41, 3)) + 0.5
    whole = three(nearest_neighbour_divergence(a, b))
    monkeypatch.setattr(distances, "ROWS", 16)
    monkeypatch.setattr(distances, "COLUMNS", 7)
    np.testing.assert_allclose(three(nearest_neighbour_divergence(a, b)), whole, rtol=1e-5)


def test_neighbours_are_told_apart_far_from_the_origin():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((400, 2)), rng.standard_normal((400, 2))
    b[:, 0] += 4000  # the two samples are far apart beside the distances within each
    expected = three(nearest_neighbour_divergence(a * 1024, b * 1024))
    np.testing.assert_allclose(three(nearest_neighbour_divergence(a, b)), expected, rtol=1e-3)
    assert expected[2] == pytest.approx(np.log(2), abs=1e-3)


def test_copies_are_refused():
    a = np.repeat(np.arange(10.0), 6)
    with pytest.raises(InputError, match="copies"):
        nearest_neighbour_divergence(a, np.arange(20) + 0.5)


@given(st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_gaussian_divergence_is_its_formula(d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((60, d)), 1.3 * rng.standard_normal((50, d)) + rng.standard_normal(d)
    mean_a, mean_b = a.mean(0, dtype=np.float32), b.mean(0, dtype=np.float32)
    cov_a, cov_b = np.cov(a.T).reshape(d, d), np.cov(b.T).reshape(d, d)
    inverse = np.linalg.inv(cov_b)
    log_det = np.log(np.linalg.det(cov_b) / np.linalg.det(cov_a))
    gap = mean_b - mean_a
    expected = (np.trace(inverse @ cov_a) + gap @ inverse @ gap - d + log_det) / 2
    found = gaussian_divergence(a, b, draws=64)
    assert found.forward.value == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # No invertible affine map of the features changes it.
    mixing = rng.standard_normal((d, d)) + 3 * np.eye(d)
    mapped = gaussian_divergence(a @ mixing + 5, b @ mixing + 5, draws=64)
    np.testing.assert_allclose(three(mapped)[:2], three(found)[:2], rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(three(gaussian_divergence(a, a, draws=64)), 0, atol=1e-6)


def test_jensen_shannon_of_gaussians_is_the_integral():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(500), 0.6 * rng.standard_normal(400) + 1
    p, q = (stats.norm(x.mean(), x.std(ddof=1)) for x in (a, b))
    found = gaussian_divergence(a, b, draws=100_000)
    np.testing.assert_allclose(three(found), numeric(p.pdf, q.pdf, (-9, 9)), rtol=0.01)


def test_a_singular_covariance_says_so_and_shrinkage_helps():
    a = np.random.default_rng(0).standard_normal((10, 20))
    with pytest.raises(InputError, match=r"singular.*shrinkage"):
        gaussian_divergence(a, a + 1)
    assert gaussian_divergence(a, a + 1, shrinkage=0.5).forward.value > 1


@given(st.integers(2, 30), st.floats(0.01, 3), st.integers(0, 10**6))
def test_count_divergence_is_that_of_scipy(size, smoothing, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.poisson(3, size) + 1, rng.poisson(2, size) + (np.arange(size) == 0)
    p, q = a + smoothing, b + smoothing
    expected = [stats.entropy(p, q), stats.entropy(q, p), jensenshannon(p, q) ** 2]
    np.testing.assert_allclose(three(count_divergence(a, b, smoothing=smoothing)), expected, atol=1e-12)
    # Documents only add up.
    documents = count_divergence(np.stack([a, a * 0]), np.stack([b, b * 0]), smoothing=smoothing, permutations=9)
    np.testing.assert_allclose(three(documents), expected, atol=1e-12)


def test_without_smoothing_a_token_of_one_side_alone_is_infinite():
    found = count_divergence([3, 1, 0], [3, 0, 2], smoothing=0)
    assert found.forward.value == found.backward.value == np.inf
    assert found.forward.low is None
    assert 0 < found.jensen_shannon.low < found.jensen_shannon.value < np.log(2)
    assert count_divergence([3, 0], [0, 2], smoothing=0).jensen_shannon.value == pytest.approx(np.log(2))


@pytest.mark.long
def test_documents_with_topics_are_no_shift():
    """Tokens come in documents of one topic: a test of single tokens would reject nearly always."""
    rng = np.random.default_rng(0)
    topics = rng.dirichlet(np.full(20, 0.3), 4)

    def documents(n, topics):
        return np.stack([rng.multinomial(100, topics[t]) for t in rng.integers(0, len(topics), n)])

    draws = 2000
    p = [
        count_divergence(documents(12, topics), documents(10, topics), permutations=99, seed=i).jensen_shannon.p_value
        for i in range(draws)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.015)
    other = rng.dirichlet(np.full(20, 0.3), 4)
    p = [
        count_divergence(documents(n, topics), documents(n, other), permutations=99).jensen_shannon.p_value
        for n in (30,) * 20
    ]
    assert np.mean(np.array(p) <= 0.05) > 0.8


def test_intervals_of_counts_cover():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(8), 2)
    truth = [stats.entropy(p, q), stats.entropy(q, p), jensenshannon(p, q) ** 2]
    covered = {"tokens": [], "documents": []}
    for _ in range(300):
        a, b = rng.multinomial(100, p, 40), rng.multinomial(100, q, 40)
        for kind, counts in (("tokens", (a.sum(0), b.sum(0))), ("documents", (a, b))):
            found = count_divergence(*counts, permutations=0)
            ends = (found.forward, found.backward, found.jensen_shannon)
            covered[kind].append([e.low <= t <= e.high for e, t in zip(ends, truth, strict=True)])
    for kind in covered.values():
        np.testing.assert_allclose(np.mean(kind, 0), 0.95, atol=0.04)


@pytest.mark.long
def test_intervals_of_gaussians_and_neighbours_cover():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(60):
        a, b = rng.standard_normal((400, 1)), rng.standard_normal((400, 1)) + 1
        gaussian = gaussian_divergence(a, b, draws=16, seed=seed).forward
        neighbours = nearest_neighbour_divergence(a, b, seed=seed).forward
        covered.append([e.low <= 0.5 <= e.high for e in (gaussian, neighbours)])
    assert (np.mean(covered, 0) >= 0.85).all()


@pytest.mark.parametrize(
    ("a", "b", "options", "says"),
    [
        ([1, 2], [1, 2, 3], {}, "2 tokens and B 3"),
        ([1, -2], [1, 2], {}, "negative"),
        ([0, 0], [1, 2], {}, "nothing was counted"),
        ([[1, 2]], [1, 2], {}, "for both"),
        ([1, 2], [1, 2], {"smoothing": -1}, "smoothing"),
        (["a", "b"], [1, 2], {}, "are numbers"),
    ],
)
def test_unusable_counts_are_one_line(a, b, options, says):
    with pytest.raises(InputError, match=says) as caught:
        count_divergence(a, b, **options)
    assert "\n" not in str(caught.value)
