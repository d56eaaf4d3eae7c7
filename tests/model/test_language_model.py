"""The language model keeps the contract of its layers, and says truly how large it is and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.errors import InputError
from tttlm.model import PRESETS, AttentionConfig, LanguageModel, Mamba2Config, ModelConfig, TTTConfig, parameter_count

SMALL = ModelConfig(
    vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, ttt=TTTConfig(mini_batch_size=4)
)
MODELS = {
    "mamba backbone": SMALL,
    "transformer backbone": dataclasses.replace(SMALL, backbone="transformer", mixers=("ttt_mlp",)),
    "hybrid, untied": dataclasses.replace(
        SMALL,
        mixers=("ttt_linear", "sliding_attention", "mamba", "mamba2"),
        num_layers=4,
        tie_embeddings=False,
        attention=AttentionConfig(sliding_window=6),
        mamba2=Mamba2Config(state_size=8, head_dim=8),
    ),
}
# Documents start on mini-batch boundaries; 0 is padding.
SEGMENTS = jnp.asarray([[1] * 6 + [0] * 2 + [2] * 8 + [3] * 4, [1] * 20])


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]


def tokens(seed=0, shape=(2, 20)):
    return jax.random.randint(jax.random.key(seed), shape, 0, 31)


@pytest.mark.long
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
def test_extend_gives_what_the_whole_gives(config, x64, segment_ids):
    config = dataclasses.replace(config, dtype="float64", param_dtype="float64")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    whole = nnx.jit(lambda m, t, s: m(t, s))(model, tokens(), segment_ids)
    extend = nnx.jit(lambda m, t, state, s: m.extend(t, state, s))
    state, logits, start = model.init_state(2), [], 0
    for length in (5, 1, 1, 5, 5, 1, 1, 1):
        piece = slice(start, start + length)
        out, state = extend(model, tokens()[:, piece], state, None if segment_ids is None else segment_ids[:, piece])
        logits.append(out)
        start += length
    real = 1 if segment_ids is None else (segment_ids != 0)[..., None]
    np.testing.assert_allclose(jnp.concatenate(logits, 1) * real, whole * real, rtol=1e-9, atol=1e-9)


def test_more_tokens_than_the_attention_cache_has_room_for_are_refused():
    config = dataclasses.replace(SMALL, mixers=("attention",), attention=AttentionConfig(max_length=8))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    _, state = model.extend(tokens()[:, :6], model.init_state(2))
    with pytest.raises(InputError, match="room for 8 tokens, got 9"):
        model.extend(tokens()[:, 6:9], state)
    logits, _ = nnx.jit(lambda m, t, s: m.extend(t, s))(model, tokens()[:, 6:9], state)
    assert np.isfinite(logits[:, :2]).all()
    assert np.isnan(logits[:, 2]).all()  # not known when it is compiled: never silently wrong


@pytest.mark.long
def test_features_leave_out_padding_as_logits_do():
    config = dataclasses.replace(SMALL, mixers=("attention",), attention=AttentionConfig(max_length=8))
    model, given = LanguageModel(config, rngs=nnx.Rngs(0)), tokens(shape=(1, 5))
    padded, real = jnp.pad(given, ((0, 0), (2, 0))), jnp.asarray([[False] * 2 + [True] * 5])
    alone, after = model.extend_features(given, model.init_state(1))
    features, state = model.extend_features(padded, model.init_state(1), mask=real)
    np.testing.assert_allclose(features[:, 2:], alone, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, after)


@pytest.mark.long
def test_a_packed_document_gives_what_it_gives_alone(x64):
    config = dataclasses.replace(SMALL, dtype="float64", param_dtype="float64")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    packed = model(tokens(), SEGMENTS)
    alone = model(tokens()[:1, 8:16])
    np.testing.assert_allclose(packed[:1, 8:16], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["block", pytest.param("dots", marks=pytest.mark.slow)])
def test_what_is_computed_again_changes_no_gradient(remat):
    def gradient(remat):
        model = LanguageModel(dataclasses.replace(SMALL, remat=remat), rngs=nnx.Rngs(0))
        graph, parameters = nnx.split(model)
        loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(tokens())))
        return jax.jit(jax.grad(loss)), parameters

    (run, parameters), (expected, _) = gradient(remat), gradient("none")
    for a, b in zip(jax.tree.leaves(run(parameters)), jax.tree.leaves(expected(parameters)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b))))
    # Something is computed again: there are more matrix products in the program.
    count = lambda f: f.lower(parameters).as_text().count("dot_general")
    assert count(run) > count(expected)


@pytest.mark.long
def test_dots_computes_less_again_than_block_does():
    def products(remat):
        graph, parameters = nnx.split(LanguageModel(dataclasses.replace(SMALL, remat=remat), rngs=nnx.Rngs(0)))
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(tokens()))))
        return gradient.lower(parameters).as_text().count("dot_general")

    assert products("none") < products("dots") < products("block")


@pytest.mark.long
def test_bfloat16_computes_close_to_float32_and_keeps_its_state_in_float32():
    low = LanguageModel(dataclasses.replace(SMALL, dtype="bfloat16"), rngs=nnx.Rngs(0))
    high = LanguageModel(SMALL, rngs=nnx.Rngs(0))
    a, b = low(tokens()), high(tokens())
    assert a.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(a - b))) < 0.05 * float(jnp.max(jnp.abs(b)))
    _, state = low.extend(tokens(), low.init_state(2))
    inner = state[0].mixer.inner
    assert {w.dtype for w in jax.tree.leaves(inner[:2])} == {jnp.dtype("float32")}


def test_the_inner_learning_rate_can_be_turned_down():
    model = LanguageModel(SMALL, rngs=nnx.Rngs(0))
    full, none = model(tokens()), model(tokens(), inner_learning_rate_multiplier=0.0)
    assert not np.allclose(full, none)
    # Without inner learning the inner model is the same for every token: order within the past stops to matter.
    plain = dataclasses.replace(SMALL, backbone="transformer")
    model = LanguageModel(plain, rngs=nnx.Rngs(0))
    first = tokens().at[:, 0].set(3), tokens().at[:, 0].set(4)
    a, b = (model(t, inner_learning_rate_multiplier=0.0)[:, 1:] for t in first)
    np.testing.assert_allclose(a, b, atol=1e-6)
    a, b = (model(t)[:, 1:] for t in first)
    assert not np.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("mixer", ["ttt_linear", "ttt_mlp", "attention", "mamba", "mamba2"])
@pytest.mark.parametrize("size", PRESETS)
def test_presets_have_the_published_shape_and_roughly_the_published_size(size, mixer):
    config = ModelConfig.preset(size, mixer=mixer)
    millions = {"125m": 125, "350m": 350, "760m": 760, "1.3b": 1300}[size]
    if "mamba" in mixer:
        assert (config.num_layers, config.hidden_size, config.intermediate_size) == (
            2 * PRESETS[size][0],
            PRESETS[size][1],
            0,
        )
    else:
        assert (config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size) == PRESETS[size]
    assert parameter_count(config) / 1e6 == pytest.approx(millions, rel=0.15)


def test_flops_are_those_of_the_compiled_matrix_products(x64):
    """For a plain block the formula is checked against XLA, with no loop that it would count once."""
    config = dataclasses.replace(
        SMALL, num_layers=1, hidden_size=64, num_heads=1, intermediate_size=96, backbone="transformer"
    )
    config = dataclasses.replace(config, ttt=TTTConfig(mini_batch_size=16))
    graph, parameters = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    forward = jax.jit(lambda p, t: nnx.merge(graph, p)(t))
    counted = forward.lower(parameters, tokens(shape=(1, 16))).compile().cost_analysis()["flops"]
    assert config.flops_per_token(16) * 16 == pytest.approx(counted, rel=0.25)


BAD = {
    "odd head width": (
        lambda: ModelConfig(hidden_size=30, num_heads=2),
        "even head dimensions, got hidden_size 30 and num_heads 2",
    ),
    "pattern": (lambda: ModelConfig(num_layers=3, mixers=("ttt_linear", "ttt_mlp")), "multiple of the 2 model.mixers"),
    "no mixer": (lambda: ModelConfig(mixers=()), "at least one mixer"),
    "size": (lambda: ModelConfig.preset("7b"), "unknown model size '7b'; there are 125m"),
    "inner MLP of zeros": (
        lambda: ModelConfig(mixers=("ttt_mlp",), ttt=TTTConfig(learned_start=False)),
        "ttt_mlp needs model.ttt.learned_start",
    ),
    "mini-batch": (lambda: ModelConfig(ttt=TTTConfig(mini_batch_size=0)), "mini_batch_size' must be at least 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_in_one_line(what):
    make, message = BAD[what]
    with pytest.raises(InputError, match=message):
        make()
