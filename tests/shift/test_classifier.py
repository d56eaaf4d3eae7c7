"""The classifier two-sample test: scikit-learn and scipy where they compute the same, level and power."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tttlm.errors import InputError
from tttlm.shift import classifier_test
from tttlm.shift.classifier import _held_out_test, logistic_regression


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_logistic_regression_is_that_of_scikit_learn(l2, x64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 5)) * [1, 3, 0.2, 1, 1]
    labels = (x[:, 0] + 3 * x[:, 2] + rng.standard_normal(80) > 0.5).astype(float)
    weights = rng.uniform(0.2, 3, 80)
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(x, labels, weights)
    coefficients, intercept = logistic_regression(x, labels, weights, l2)
    np.testing.assert_allclose(coefficients, theirs.coef_[0], rtol=1e-5, atol=1e-7)
    assert intercept == pytest.approx(theirs.intercept_[0], rel=1e-5)


def test_separable_samples_are_learned_all_the_same():
    x = np.concatenate([np.full((20, 3), -1.0), np.full((20, 3), 1.0)]).astype(np.float32)
    coefficients, _ = logistic_regression(x, np.repeat([0, 1], 20).astype(np.float32), np.ones(40, np.float32), 1e-4)
    assert np.isfinite(coefficients).all()
    assert (coefficients > 1).all()


def test_the_numbers_are_those_of_scipy_and_scikit_learn():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 1, 60), rng.normal(0.5, 1, 60)]).round(1)  # with ties
    found = _held_out_test(scores, 60, 999, np.random.default_rng(1))
    right = int(np.sum(scores[:60] < 0) + np.sum(scores[60:] >= 0))
    binomial = stats.binomtest(right, 120, alternative="greater")
    assert found.accuracy.value == right / 120
    assert found.accuracy.p_value == pytest.approx(binomial.pvalue, rel=1e-9)
    ends = stats.binomtest(right, 120).proportion_ci(0.95, "exact")
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    assert found.auc.value == pytest.approx(roc_auc_score(np.repeat([0, 1], 60), scores), rel=1e-12)
    exact = stats.mannwhitneyu(scores[60:], scores[:60], alternative="greater").pvalue
    assert found.auc.p_value == pytest.approx(exact, abs=0.01)
    for worst, value in ((scores * 0 - 1, 0.5), (np.repeat([1.0, -1.0], 60), 0.0), (np.repeat([-1.0, 1.0], 60), 1.0)):
        found = _held_out_test(worst, 60, 99, rng)
        assert found.accuracy.value == found.auc.value == value
        assert found.accuracy.low <= value <= found.accuracy.high


@pytest.mark.long
def test_under_no_shift_five_per_cent_are_rejected():
    rng = np.random.default_rng(0)
    found = []
    for seed in range(2000):
        # Many held out, as an accuracy of few samples can take too few values to reach 5% closely.
        test = classifier_test(*rng.standard_normal((2, 440, 1)), held_out=0.95, permutations=99, seed=seed)
        found.append((test.accuracy.p_value, test.accuracy_permutation_p, test.auc.p_value))
    np.testing.assert_allclose(np.mean(np.array(found) <= 0.05, 0), 0.05, atol=0.015)


def test_samples_of_other_sizes_are_no_shift():
    rng = np.random.default_rng(0)
    p = [
        classifier_test(rng.standard_normal((30, 2)), rng.standard_normal((300, 2)), permutations=19).accuracy.p_value
        for _ in range(1000)
    ]
    assert np.mean(np.array(p) <= 0.05) < 0.065


def test_power_grows_with_shift_and_samples():
    rng = np.random.default_rng(0)

    def power(n, shift):
        tests = [
            classifier_test(rng.standard_normal((n, 2)), rng.standard_normal((n, 2)) + shift, permutations=19, seed=i)
            for i in range(100)
        ]
        return np.mean([(t.accuracy.p_value <= 0.05, t.auc.p_value <= 0.05) for t in tests], 0)

    for weak, middle, strong in (
        [power(60, s) for s in (0.1, 0.45, 1.0)],
        [power(n, 0.4) for n in (20, 80, 320)],
    ):
        assert (weak < middle - 0.1).all()
        assert (middle < strong - 0.1).all()


def test_the_mlp_sees_what_no_line_can():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((400, 2)), 2.5 * rng.standard_normal((400, 2))
    line = classifier_test(a, b, permutations=19)
    bent = classifier_test(a, b, classifier="mlp", permutations=19)
    assert line.auc.value < 0.6
    assert bent.auc.value > 0.75
    assert bent.accuracy.low > 0.6
    assert classifier_test(a, b, classifier="mlp", permutations=19) == bent


def test_units_and_constant_features_do_not_matter():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 0.7
    before = classifier_test(a, b, permutations=19)
    scaled = [np.column_stack([x * [1e3, 1e-3], np.full(100, 5.0)]) for x in (a, b)]
    after = classifier_test(*scaled, permutations=19)
    assert after.auc.value == pytest.approx(before.auc.value, abs=2e-3)


def test_unusable_input_is_one_line():
    a = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(InputError, match="unknown classifier 'tree'; there are 'logistic' and 'mlp'"):
        classifier_test(a, a, classifier="tree")
    with pytest.raises(InputError, match="held_out"):
        classifier_test(a, a, held_out=1.0)
    with pytest.raises(InputError, match="sample B has 7 samples; this measure needs at least 8"):
        classifier_test(a, a[:7])
