"""Linen modules give what the NNX layers give, under Linen's transforms too."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import tttlm.linen
from tttlm import layers
from tttlm.errors import InputError
from tttlm.linen import to_linen, to_nnx

LAYERS = {
    "TTTLinear": ((8, 2), {"mini_batch_size": 4}),
    "Attention": ((8, 2), {"sliding_window": 3}),
    "Mamba2": ((8,), {"state_size": 2, "head_dim": 4}),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)


@pytest.mark.long
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_go_both_ways_and_outputs_and_states_agree(name):
    arguments, options = LAYERS[name]
    module = getattr(tttlm.linen, name)(*arguments, **options)
    layer = getattr(layers, name)(*arguments, **options, rngs=nnx.Rngs(1))
    variables = module.init(jax.random.key(0), X)
    assert np.max(np.abs(module.apply(variables, X) - layer(X))) > 1e-4
    to_nnx(layer, variables["params"])
    state = module.apply(variables, 2, method="init_state")
    got, expected = module.apply(variables, X, state, method="extend"), layer.extend(X, layer.init_state(2))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    jax.tree.map(np.testing.assert_array_equal, to_linen(layer), variables["params"])
    assert serialization.from_bytes(variables, serialization.to_bytes(variables)).keys() == variables.keys()


def test_names_are_those_of_the_layer_and_what_is_wrong_is_named():
    layer = layers.TTTLinear(8, 2, rngs=nnx.Rngs(0))
    params = to_linen(layer)
    assert set(params) >= {"q_proj", "inner", "inner_norm", "post_norm"}
    assert set(params["inner"]["0"]) == {"kernel", "bias"}
    with pytest.raises(InputError, match=r"inner/0/bias must have shape \(2, 4\), got None"):
        to_nnx(layer, {**params, "inner": {"0": {"kernel": params["inner"]["0"]["kernel"]}}})
    with pytest.raises(InputError, match="no parameter other/kernel"):
        to_nnx(layer, {**params, "other": {"kernel": jnp.ones(1)}})


def test_every_layer_has_its_module():
    built_on_another = {"Bidirectional", "MemoryAsContext", "MemoryAsGate", "SharedWindow", "scan_image"}
    assert set(layers.__all__) - built_on_another <= set(tttlm.linen.__all__)


@pytest.mark.long
def test_a_function_that_makes_a_layer_becomes_a_module():
    build = lambda width, *, rngs: layers.Bidirectional(layers.Mamba(width, state_size=2, rngs=rngs))
    module = tttlm.linen.linen_layer(build)(8)
    variables, layer = module.init(jax.random.key(0), X), build(8, rngs=nnx.Rngs(1))
    to_nnx(layer, variables["params"])
    np.testing.assert_allclose(module.apply(variables, X), layer(X), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GLA", "LaCT", "Titans"])
def test_a_published_learner_takes_its_configuration(name):
    layer = getattr(layers, name)
    config = layer.Config(**({} if name == "GLA" else {"chunk_size": 4}))
    module, nnx_layer = getattr(tttlm.linen, name)(8, 2, config), layer(8, 2, config, rngs=nnx.Rngs(1))
    variables = module.init(jax.random.key(0), X)
    to_nnx(nnx_layer, variables["params"])
    np.testing.assert_allclose(module.apply(variables, X), nnx_layer(X), rtol=1e-5, atol=1e-6)


def test_arguments_are_those_of_the_layer():
    written = set(inspect.signature(tttlm.linen.TTTLinear).parameters)
    assert written == set(inspect.signature(layers.TTTLinear.__init__).parameters) - {"self", "rngs"} | {"name"}


@pytest.mark.long
def test_a_compact_model_is_scanned_and_recomputed():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + tttlm.linen.TTTLinear(8, 2, mini_batch_size=4, name="ttt")(nn.RMSNorm()(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return stack(name="stack")(x, None)[0]

    variables = Model().init(jax.random.key(0), X)
    kernel = variables["params"]["stack"]["ttt"]["q_proj"]["kernel"]
    assert kernel.shape == (2, 8, 8)
    assert np.max(np.abs(kernel[0] - kernel[1])) > 1e-4
    gradient = jax.grad(lambda v: jnp.sum(Model().apply(v, X) ** 2))(variables)
    assert np.max(np.abs(gradient["params"]["stack"]["ttt"]["inner"]["0"]["kernel"])) > 0
