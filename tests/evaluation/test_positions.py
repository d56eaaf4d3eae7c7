"""Loss by position is that of the whole stretch, whatever is read side by side and however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.comparison.results import estimate
from tttlm.data import Document
from tttlm.evaluation.positions import Stretch, edges, losses_by_position, some, stretches
from tttlm.model import LanguageModel, ModelConfig
from tttlm.training.loss import token_losses

BINS = [0, 1, 2, 4, 8, 16, 24]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, mixers=("attention",)
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x * 8, nnx.state(model, nnx.Param)))
    return model


def parts() -> list[Stretch]:
    rng = np.random.default_rng(0)
    lengths = [(0, 25), (0, 25), (1, 12), (2, 3), (1, 25)]
    return [Stretch(document, rng.integers(0, 50, length).astype(np.int32)) for document, length in lengths]


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "chunk"), [(3, 8)])
def test_batch_size_and_chunk_do_not_change_it(model, batch_size, chunk):
    nats, tokens = losses_by_position(model, parts(), BINS, batch_size=batch_size, chunk=chunk, description="scoring")
    expected, counted = np.zeros((2, 3, len(BINS) - 1))
    for part in parts():
        losses = token_losses(model(jnp.asarray(part.tokens[None, :-1])), jnp.asarray(part.tokens[None, 1:]))[0]
        for place, loss in enumerate(np.asarray(losses)):
            bin_ = np.searchsorted(BINS, place, side="right") - 1
            expected[part.document, bin_] += loss
            counted[part.document, bin_] += 1
    np.testing.assert_array_equal(tokens, counted)
    np.testing.assert_allclose(nats, expected, rtol=1e-4)


def test_stretches_are_whole_spread_and_do_not_overlap():
    tokens = np.arange(1001)
    long, short = Document(tokens, 5000, "long"), Document(tokens[:60], 300, "short")
    found = stretches([long, short], 100, 4)
    assert [(part.document, part.tokens[0], len(part.tokens)) for part in found] == [
        *((0, start, 101) for start in (0, 300, 600, 900)),
        (1, 0, 60),
    ]
    assert len(stretches([long], 100, 50)) == 10
    assert [d.name for d in some([long, short, long], 2)] == ["long", "long"]


def test_bins_are_powers_of_two_and_the_length_trained_on():
    assert edges(20, 6) == [0, 1, 2, 4, 6, 8, 16, 20]
    assert edges(16, 16) == [0, 1, 2, 4, 8, 16]


def test_a_difference_taken_document_by_document_is_surer_than_two_losses():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=50)  # what is common to both models: how hard a document is
    a, b = hard + 0.01 * rng.normal(size=50), hard + 0.1 + 0.01 * rng.normal(size=50)
    difference = estimate(b - a)
    assert difference.error < 0.1 * estimate(a).error
    assert abs(difference.mean - 0.1) < 4 * difference.error
    assert estimate(a).error == pytest.approx(np.std(a, ddof=1) / 50**0.5)
    assert estimate(a[:1]).error is None
