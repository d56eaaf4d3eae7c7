"""Samples go in as arrays or through a model's features; what cannot be used is one line, in every measure."""

import jax.numpy as jnp
import numpy as np
import pytest

from tttlm import shift
from tttlm.errors import InputError
from tttlm.shift import compare_counts, compare_samples, features_of
from tttlm.shift.panel import feature_differences

OF_FEATURES = [
    shift.nearest_neighbour_divergence,
    shift.gaussian_divergence,
    shift.sliced_wasserstein,
    shift.entropic_wasserstein,
    shift.gaussian_wasserstein,
    shift.frechet_distance,
    shift.mmd,
    shift.linear_time_mmd,
    shift.classifier_test,
    shift.compare_samples,
]


def test_features_are_extracted_in_batches():
    inputs = np.arange(20, dtype=np.float32).reshape(10, 2)
    seen = []

    def features(batch):
        seen.append(len(batch))
        return jnp.asarray(batch) @ jnp.ones((2, 3))

    found = features_of(inputs, features, batch_size=4)
    assert seen == [4, 4, 2]
    np.testing.assert_allclose(found, inputs @ np.ones((2, 3)))
    np.testing.assert_allclose(features_of([1, 2]), [[1.0], [2.0]])
    assert features_of(jnp.ones((2, 2), jnp.bfloat16)).dtype == np.float32


@pytest.mark.parametrize("measure", OF_FEATURES, ids=lambda f: f.__name__)
def test_a_callable_gives_what_its_features_give(measure):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 3)), rng.standard_normal((60, 3)) + 0.5
    features = lambda batch: np.tanh(batch[:, :2])
    assert str(measure(a, b, features=features)) == str(measure(features(a), features(b)))


@pytest.mark.parametrize("measure", OF_FEATURES, ids=lambda f: f.__name__)
def test_unusable_samples_are_one_line(measure):
    a = np.ones((9, 2))
    for wrong, says in (
        (np.ones((9, 3)), "A has 2 features and B has 3"),
        (np.full((9, 2), np.nan), "sample B has NaN or infinite features in 9 of 9 samples"),
        (np.ones((9, 2, 2)), r"shape \(9, 2, 2\); features are \[N, D\]"),
        (np.zeros((0, 2)), r"shape \(0, 2\)"),
        (np.full((9, 2), "x"), "features are numbers"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            measure(a, wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.long
def test_all_measures_stand_side_by_side_and_say_when_they_cannot():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((120, 3)), rng.standard_normal((100, 3)) + 1
    found = {m.name: m for m in compare_samples(a, b, pairs=80, permutations=19)}
    assert len(found) == 17
    for m in found.values():
        assert m.estimate is not None, m
        assert m.estimate.value > 0
        assert m.estimate.p_value is not None or m.estimate.low is not None
        assert m.estimate.p_value is None or m.estimate.p_value <= 0.05, m
    assert found["MMD^2, median bandwidth"].note == "80 and 80 samples"
    assert found["Gaussian Wasserstein-2"].estimate.value ** 2 == pytest.approx(
        found["Frechet distance"].estimate.value
    )
    # Copies have no nearest-neighbour divergence; everything else is measured.
    coins = rng.integers(0, 2, (120, 3)).astype(float)
    found = {m.name: m for m in compare_samples(coins, coins[:100], permutations=19, entropic=False)}
    assert found["KL(A||B), nearest neighbours"].estimate is None
    assert "copies" in found["KL(A||B), nearest neighbours"].note
    assert found["Frechet distance"].estimate.value == pytest.approx(0, abs=0.01)


def test_one_feature_has_its_exact_distance():
    found = {m.name: m for m in compare_samples(np.arange(50.0), np.arange(50.0) + 3, permutations=19)}
    assert found["Wasserstein-1"].estimate.value == pytest.approx(3)


def test_counts_stand_side_by_side():
    found = compare_counts([[3, 1], [2, 2]] * 5, [[1, 3], [2, 3]] * 5)
    assert [m.name for m in found] == [f"{n}, token counts" for n in ("KL(A||B)", "KL(B||A)", "Jensen-Shannon")]
    assert found[2].estimate.p_value < 0.05


def test_the_feature_that_differs_is_found():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 5)), rng.standard_normal((200, 5))
    a[:, 4] = b[:, 4] = 7
    b[:, 2] += 3
    differences = feature_differences(a, b)
    assert differences.argmax() == 2
    assert differences[2] == pytest.approx(3, rel=0.1)
    assert differences[4] == 0
