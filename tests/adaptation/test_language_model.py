"""Dynamic evaluation scores every token before it learns from it, with every mixer, and learns what it says it does."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.adaptation.models import same
from tttlm.adaptation.language_model import DynamicConfig, DynamicEvaluation, _learned
from tttlm.errors import InputError
from tttlm.model import LanguageModel, Mamba2Config, ModelConfig
from tttlm.training.loss import token_losses

MIXERS = ("ttt_linear", "ttt_mlp", "attention", "mamba", "mamba2")
REPEATED = np.tile(np.random.default_rng(0).integers(0, 32, 6), 12)
STEP = DynamicConfig(learning_rate=0.1, stretch=8)
ON = DynamicConfig(learning_rate=0.1, stretch=8, reset="never")
STATIC = DynamicConfig(stretch=8)


@cache
def made(*mixers: str) -> LanguageModel:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        num_layers=len(mixers),
        num_heads=2,
        intermediate_size=24,
        mixers=mixers,
        mamba2=Mamba2Config(head_dim=8, state_size=8),
    )
    return nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()


@cache
def evaluation(config: DynamicConfig, *mixers: str) -> DynamicEvaluation:
    return DynamicEvaluation(made(*mixers), config)


def losses(mixers, tokens, config) -> np.ndarray:
    return evaluation(config, *mixers)([tokens]).losses[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=() if m in ("ttt_linear", "attention") else pytest.mark.slow) for m in MIXERS]
)
def test_every_mixer_learns_and_no_later_token_changes_an_earlier_score(mixer):
    here = 29
    static, dynamic = (losses([mixer], REPEATED, DynamicConfig(learning_rate=rate, stretch=8)) for rate in (0.0, 0.1))
    np.testing.assert_array_equal(dynamic[:8], static[:8])
    assert dynamic[-24:].mean() < static[-24:].mean() - 0.05
    changed = REPEATED.copy()
    changed[here + 1 :] = (changed[here + 1 :] + 1) % 32
    np.testing.assert_array_equal(losses([mixer], changed, STEP)[:here], dynamic[:here])


@pytest.mark.long
def test_the_same_test_catches_a_score_taken_after_learning():
    changed, here = REPEATED.copy(), 29
    changed[here + 1 :] = (changed[here + 1 :] + 1) % 32

    def cheat(tokens):  # learns from the stretch, then scores it
        return evaluation(ON, "ttt_linear")([tokens, tokens]).losses[1]

    assert not np.array_equal(cheat(changed)[:here], cheat(REPEATED)[:here])


@pytest.mark.long
def test_without_learning_it_is_the_loss_of_the_model():
    model = made("ttt_linear", "attention")
    tokens = np.random.default_rng(1).integers(0, 32, 45)
    expected = token_losses(model(jnp.asarray(tokens)[None, :-1]), jnp.asarray(tokens)[None, 1:])[0]
    for stretch in (7, 100):
        found = losses(["ttt_linear", "attention"], tokens, DynamicConfig(stretch=stretch))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_step_is_a_step_of_the_optimiser_on_the_stretch_that_was_read():
    model, tokens = made("mamba"), jnp.asarray(REPEATED[:17])
    config = DynamicConfig(learning_rate=0.3, stretch=8, clip=0.5)
    graph, params = nnx.split(model)

    @jax.jit
    def loss(params):
        return token_losses(nnx.merge(graph, params)(tokens[None, :8]), tokens[None, 1:9]).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    scale = 0.3 * min(1.0, 0.5 / float(optax.tree.norm(gradient)))
    learned = nnx.merge(graph, jax.tree.map(lambda p, g: p - scale * g, params, gradient))
    _, state = model.extend(tokens[None, :8], model.init_state(1))  # as it was read
    logits, _ = learned.extend(tokens[None, 8:16], state)
    expected = token_losses(logits, tokens[None, 9:])[0]
    np.testing.assert_allclose(losses(["mamba"], REPEATED[:17], config)[8:], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("learns", ["all", "norms", "feed_forward", "lora"])
def test_what_learns_is_what_was_asked_for(learns):
    model = made("ttt_linear", "attention")
    config = DynamicConfig(learning_rate=0.1, optimizer="adam", learns=learns, rank=2, stretch=8)
    learned, bind = _learned(model, config)
    paths = lambda model: dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    before = paths(model)
    assert same(nnx.state(bind(learned)), nnx.state(model))  # nothing is changed before anything is learned
    moved = paths(bind(jax.tree.map(lambda x: x + 1, learned)))
    names = {path for path in before if not jnp.array_equal(before[path][...], moved[path][...])}
    expected = {
        "all": lambda path: True,
        "norms": lambda path: "norm" in str(path[-2]),
        "feed_forward": lambda path: "feed_forward" in path,
        "lora": lambda path: "_proj" in str(path[-2]) and path[-1] == "kernel",
    }[learns]
    assert names == {path for path in before if expected(path)}
    mixers = ["ttt_linear", "attention"]
    static = losses(mixers, REPEATED, STATIC)
    assert losses(mixers, REPEATED, config)[-24:].mean() < static[-24:].mean()
    if learns == "lora":
        a, b = learned[0]
        assert (a.shape[-1], b.shape[-2]) == (2, 2)


def test_documents_start_from_the_first_parameters_or_from_the_last():
    documents = [REPEATED[:33], REPEATED[:33]]
    again = evaluation(STEP, "ttt_linear")(documents).losses
    np.testing.assert_array_equal(again[0], again[1])
    on = evaluation(ON, "ttt_linear")(documents).losses
    np.testing.assert_array_equal(on[0], again[0])
    assert on[1].mean() < again[1].mean() - 0.05


@pytest.mark.long
def test_decay_towards_the_first_parameters_undoes_learning():
    model = ["ttt_linear"]
    static = losses(model, REPEATED, STATIC)
    tied = losses(model, REPEATED, DynamicConfig(learning_rate=0.1, stretch=8, decay=1.0))
    np.testing.assert_allclose(tied, static, rtol=1e-4, atol=1e-5)
    some = losses(model, REPEATED, DynamicConfig(learning_rate=0.1, stretch=8, decay=0.2))
    free = losses(model, REPEATED, STEP)
    assert free[-24:].mean() < some[-24:].mean() < static[-24:].mean()


def test_short_and_empty_documents_are_scored_too():
    found = evaluation(STEP, "ttt_linear")([REPEATED[:1], REPEATED[:2], REPEATED[:0]])
    assert [len(document) for document in found.losses] == [0, 1, 0]
    assert found.tokens == 1
    assert found.loss == pytest.approx(found.nats) == pytest.approx(float(found.losses[1][0]))


def test_tokens_and_lengths_that_cannot_be_read_are_refused():
    with pytest.raises(InputError, match="vocabulary of 32"):
        evaluation(STEP, "ttt_linear")([np.array([1, 32])])
    longest = made("attention").config.attention.max_length
    with pytest.raises(InputError, match="max_length"):
        evaluation(STEP, "attention")([np.zeros(longest + 2, int)])
