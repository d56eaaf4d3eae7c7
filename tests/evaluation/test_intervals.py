"""Intervals by bootstrap cover what they should, and those of paired differences are narrower."""

import numpy as np
import pytest

from tttlm.evaluation.intervals import bootstrap


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        losses = rng.normal(2.0, 0.5, (40, 1))
        found = bootstrap(losses * 10, np.full((40, 1), 10), resamples=300, seed=trial)
        covered += bool(found.low[0] <= 2.0 <= found.high[0])
    assert 180 <= covered <= 198  # 95%, a little less for 40 documents


def test_a_paired_difference_is_surer_than_two_losses():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (30, 3))
    hard = rng.normal(3, 1, (30, 1))  # how hard a document is, for both models
    a, b = ((hard + shift + 0.01 * rng.normal(size=(30, 3))) * tokens for shift in (0.1, 0.0))
    alone = bootstrap(a, tokens, resamples=500, seed=0)
    paired = bootstrap(a, tokens, against=b, resamples=500, seed=0)
    np.testing.assert_allclose(paired.mean, 0.1, atol=0.01)
    assert (paired.high - paired.low < 0.1 * (alone.high - alone.low)).all()
    assert (paired.low > 0).all()


def test_documents_count_by_their_tokens_and_empty_bins_have_no_mean():
    nats, tokens = np.array([[10.0, 0.0], [2.0, 0.0]]), np.array([[1, 0], [9, 0]])
    found = bootstrap(nats, tokens, resamples=100, seed=0)
    assert found.mean[0] == pytest.approx(1.2)
    assert np.isnan(found.mean[1])
    assert np.isnan(found.low[1])
    assert bootstrap(nats[:1], tokens[:1], resamples=100, seed=0).low is None
