"""Layers of published learners: what holds for each beyond the contract, which tests/mixers/test_contract.py tests."""

import ast
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mixers.learners import LAYERS, TIME, WIDTH
from tttlm.errors import InputError
from tttlm.layers import TTT
from tttlm.mixers.learners.features import PolynomialFeatures
from tttlm.mixers.learners.layer import unit
from tttlm.mixers.learners.mixer import LearnerMixer, PublishedLayer
from tttlm.model import ModelConfig, TTTConfig
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
