"""Layers of published learners: what holds for each beyond the contract, which tests/mixers/test_contract.py tests."""

import ast
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mixers.learners import F64, LAYERS, TIME, WIDTH
from tttlm.errors import InputError
from tttlm.layers import TTT, Attention, GatedDeltaNet, LaCT, MemoryAsContext, MemoryAsGate, SharedWindow
from tttlm.mixers.learners.conventions import unit
from tttlm.mixers.learners.features import PolynomialFeatures
from tttlm.mixers.learners.mixer import LearnerMixer, PublishedLayer
from tttlm.model import AttentionConfig, ModelConfig, TTTConfig
from tttlm.ops.ttt import Learner, published
from tttlm.ops.ttt.models import MLP

# Documents that start anywhere, some within a chunk, with padding before, within and between them.
IDS = jnp.asarray([[0, 1, 1, 1, 1, 0, 2, 2, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6]])
QUICK = ("gated_deltanet", "comba", "inplace_ttt")


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYERS])
def test_cut_within_a_chunk_and_packed_a_layer_gives_what_it_gives_whole(name, x64):
    graph, parameters = nnx.split(nnx.jit(lambda: LAYERS[name](nnx.Rngs(0)))())
    rng = np.random.default_rng(1)
    parameters = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape), parameters)
    x = jnp.asarray(rng.normal(size=(2, TIME, WIDTH)))

    @jax.jit
    def both(parameters, x):
        layer = nnx.merge(graph, parameters)
        first, state = layer.extend(x[:, :7], layer.init_state(2), IDS[:, :7])
        second, state = layer.extend(x[:, 7:], state, IDS[:, 7:])
        return layer(x, IDS), jnp.concatenate([first, second], axis=1)

    whole, pieces = both(parameters, x)
    real = np.asarray(IDS != 0)
    np.testing.assert_allclose(np.asarray(pieces)[real], np.asarray(whole)[real], rtol=1e-9, atol=1e-12)
    assert np.std(np.asarray(whole)[real]) > 1e-6


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYERS])
def test_what_happens_inside_is_measured_of_every_layer(name, x64):
    """Traced, not computed: tests/ops/test_conformance.py has the numbers."""
    layer = nnx.eval_shape(lambda: LAYERS[name](nnx.Rngs(0)))
    graph, parameters = nnx.split(layer)
    x = jax.ShapeDtypeStruct((2, 16, WIDTH), jnp.float64)
    found = jax.eval_shape(lambda p, x: nnx.merge(graph, p).inner_statistics(x), parameters, x)
    assert [a.shape for a in found] == [(), (), (), (), (4,)]


def test_a_configuration_names_the_implementation_or_is_told_in_one_line_why_it_cannot():
    model = ModelConfig(mixers=("gated_deltanet",), mixer_options={"gated_deltanet": {"implementation": "chunked"}})
    assert nnx.eval_shape(lambda: model.pattern[0].build(rngs=nnx.Rngs(0))).implementation == "chunked"
    for options, message in (
        ({"mixers": ("titans",), "mixer_options": {"titans": {"implementation": "delta"}}}, "titans: .*'delta' cannot"),
        ({"mixers": ("lact",), "mixer_options": {"lact": {"implementation": "fast"}}}, "lact: implementation must be"),
        ({"ttt": TTTConfig(implementation="linear_scan")}, r"model\.ttt: implementation 'linear_scan' cannot"),
        ({"mixers": ("atlas",), "mixer_options": {"atlas": {"momentum": False}}}, "muon needs momentum"),
        ({"mixers": ("gla",), "num_heads": 7}, "num_heads must divide"),
    ):
        with pytest.raises(InputError, match=message) as error:
            ModelConfig(**options)
        assert "\n" not in str(error.value)


def test_an_inner_model_that_cannot_start_from_zero_is_refused():
    with pytest.raises(InputError, match="it needs learned_start"):
        TTT(WIDTH, 2, learner=Learner(model=MLP((8,))), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("degree", [1, 3])
def test_polynomial_features_have_the_series_of_the_exponential_for_a_kernel(degree, x64):
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    features = PolynomialFeatures(degree)
    inner = np.sum(np.asarray(unit(q)) * np.asarray(unit(k)), axis=-1)
    expected = sum(inner**i / math.factorial(i) for i in range(degree + 1))
    np.testing.assert_allclose(np.sum(np.asarray(features(q)) * np.asarray(features(k)), axis=-1), expected)
    assert features.degrees(3).shape == (math.comb(3 + degree, degree),) == features(q).shape[1:]


def test_no_published_learner_has_a_part_of_more_than_forty_lines():
    """Without docstrings: the description of each, its layer, and its mixer."""

    def lines(part) -> int:
        tree = ast.parse(inspect.getsource(part))
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        documented = [node.body[0] for node in defined if ast.get_docstring(node)]
        return tree.body[0].end_lineno - sum(node.end_lineno - node.lineno + 1 for node in documented)

    layers = PublishedLayer.__subclasses__()
    descriptions = [f for f in vars(published).values() if inspect.isfunction(f) and f.__module__ == published.__name__]
    assert len(layers) >= 12
    assert len(descriptions) >= 12
    for part in (*layers, *descriptions, *LearnerMixer.__subclasses__()):
        if part.__module__.startswith("tttlm."):
            assert lines(part) <= 40, part


@pytest.mark.long
def test_titans_as_a_gate_and_as_context_are_the_equations_of_the_paper(x64):
    """Segment by segment, with the softmax and the read-out written out; the memory is the layer that others test."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 10, WIDTH)))
    layer = LAYERS["titans_gate"](nnx.Rngs(0))

    def gated(y, read):
        normed = lambda a: a / jnp.sqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-6)
        return normed(y) / (1 + jnp.exp(-normed(read)))

    np.testing.assert_allclose(layer(x), gated(layer.attention(x), layer.memory(x)), rtol=1e-9)

    layer, size = LAYERS["titans_context"](nnx.Rngs(0)), 4
    memory, inside, outputs = layer.memory, layer.attention, []
    state = memory.init_state(1)
    for start in range(0, 10, size):
        piece = x[:, start : start + size]
        time = piece.shape[1]
        q = unit(jax.nn.silu(memory.q_proj(piece).reshape(1, time, 2, -1)))
        recalled = jnp.einsum("bthk,bhkv->bthv", q, state.inner[0].weights[0].kernel)
        context = memory._output(piece, None, recalled)
        q, k, v = inside._project(piece, jnp.arange(time))
        _, context_k, context_v = inside._project(context, jnp.arange(time))
        k, v = jnp.concatenate([context_k, k], axis=1), jnp.concatenate([context_v, v], axis=1)
        seen = jnp.tile(jnp.tril(jnp.ones((time, time), bool)), 2)
        scores = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5, -jnp.inf)
        y = inside.o_proj(jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v).reshape(1, time, -1))
        read, state = memory.extend(y, state)
        outputs.append(gated(y, read))
    np.testing.assert_allclose(layer(x), jnp.concatenate(outputs, axis=1), rtol=1e-9)


def test_a_memory_that_cannot_be_context_is_refused():
    of_width = lambda layer, width=WIDTH: layer(width, 2, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="steps at every token from an anchor"):
        nnx.eval_shape(lambda: MemoryAsContext(of_width(LaCT), of_width(Attention)))
    with pytest.raises(InputError, match="the same hidden_size"):
        nnx.eval_shape(lambda: MemoryAsGate(of_width(GatedDeltaNet, 2 * WIDTH), of_width(Attention)))


@pytest.mark.long
def test_a_window_with_the_projections_of_a_memory_is_attention_and_memory_with_one_set_of_weights(x64):
    """The projection out is linear: the outputs of both alone are summed. The memory's queries and keys are scaled."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, WIDTH)))
    plain = LaCT(WIDTH, 2, LaCT.Config(chunk_size=4, muon=False, momentum=False), rngs=nnx.Rngs(0), **F64)
    layer = SharedWindow(plain, sliding_window=5)
    attention = Attention(WIDTH, 2, sliding_window=5, rngs=nnx.Rngs(1), **F64)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).kernel[...] = getattr(layer.memory, name).kernel[...]
    np.testing.assert_allclose(layer(x), layer.memory(x) + attention(x), rtol=1e-9)

    scales = jnp.asarray(np.random.default_rng(2).normal(size=layer.qk_scale.shape))
    layer.qk_scale[...] = scales
    scaled, memory = layer(x), layer.memory
    memory.q_proj.kernel[...] *= scales[0]
    memory.k_proj.kernel[...] *= scales[1]
    np.testing.assert_allclose(scaled, memory(x) + attention(x), rtol=1e-9)


def test_a_memory_that_cannot_share_its_projections_is_refused():
    with pytest.raises(InputError, match="must have rotary embeddings"):
        nnx.eval_shape(lambda: SharedWindow(GatedDeltaNet(WIDTH, 2, rngs=nnx.Rngs(0)), sliding_window=4))
    with pytest.raises(InputError, match="attention_head_dim must be even and divide the head_dim 64, got 48"):
        ModelConfig(mixers=("lact",), mixer_options={"lact": {"sliding_window": 8, "attention_head_dim": 48}})


def test_a_window_of_lact_costs_what_attention_does_without_its_projections():
    model = ModelConfig(mixers=("lact",), mixer_options={"lact": {"sliding_window": 100}})
    alone = ModelConfig(mixers=("lact",)).pattern[0].flops_per_token(512)
    sliding = ModelConfig(mixers=("sliding_attention",), attention=AttentionConfig(sliding_window=100)).pattern[0]
    expected = alone + sliding.flops_per_token(512) - 8 * model.hidden_size**2
    assert model.pattern[0].flops_per_token(512) == pytest.approx(expected)


@pytest.mark.long
def test_positions_given_to_lact_rotate_and_a_layer_without_rotation_refuses_them(x64):
    layer = LaCT(WIDTH, 2, LaCT.Config(chunk_size=4, muon=False, momentum=False), rngs=nnx.Rngs(0), **F64)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 10, WIDTH)))
    counted = jnp.arange(10)[None]
    call = jax.jit(lambda positions: layer(x, positions=positions))
    np.testing.assert_array_equal(call(counted), call(None))
    stretched = call(2 * counted)
    assert float(jnp.max(jnp.abs(stretched - call(None)))) > 1e-3
    first, state = layer.extend(x[:, :7], layer.init_state(1), positions=2 * counted[:, :7])
    second, _ = layer.extend(x[:, 7:], state, positions=2 * counted[:, 7:])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), stretched, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="rotary embeddings, which this layer does not have"):
        LAYERS["titans"](nnx.Rngs(0))(x, positions=counted)
