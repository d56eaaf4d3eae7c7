"""The networks are those of the paper, and the Y learns where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.adaptation import rotation_objective
from tttlm.adaptation.y_shape import SELF_SUPERVISED_PATH, SHARED, _convolve, resnet26, small_conv_net
from tttlm.errors import InputError


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_a_convolution_is_a_convolution(stride, side):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, side, side, 3), (3, 3, 3, 4)]))
    padding = ((1, 1), (1, 1))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(_convolve(x, kernel, (stride, stride), padding), expected, rtol=1e-4, atol=1e-4)


def test_resnet26_has_the_layers_and_parameters_of_the_papers():
    model = nnx.eval_shape(lambda: resnet26(rngs=nnx.Rngs(0)))
    count = lambda *parts: sum(x.size for part in parts for x in jax.tree.leaves(nnx.state(part, nnx.Param)))
    stage = lambda i, o: (9 * i * o + 2 * i) + (9 * o * o + 2 * o) + 3 * 2 * (9 * o * o + 2 * o)
    shared = 9 * 3 * 16 + stage(16, 16) + stage(16, 32)
    branch = lambda outputs: stage(32, 64) + 2 * 64 + 65 * outputs
    assert count(model.shared) == shared
    assert count(model.main) == branch(10)
    assert count(model.auxiliary) == branch(4)
    main_path = [m for part in (model.shared, model.main) for _, m in nnx.iter_modules(part)]
    assert sum(isinstance(m, (nnx.Conv, nnx.Linear)) for m in main_path) == 26
    norms = [m for m in main_path if isinstance(m, nnx.GroupNorm)]
    assert len(norms) == 25
    assert {m.num_groups for m in norms} == {8}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet26_answers_both_tasks(norm):
    def answers(images):
        model = resnet26(norm=norm, rngs=nnx.Rngs(0))
        return model(images), model.self_supervised(images)

    main, auxiliary = jax.eval_shape(answers, jnp.zeros((2, 8, 8, 3)))
    assert (main.shape, auxiliary.shape) == ((2, 10), (2, 4))


def test_the_main_branch_rests_and_the_rest_learns_from_the_self_supervised_loss():
    model = nnx.jit(lambda: small_conv_net(features=8, rngs=nnx.Rngs(0)))()
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p: rotation_objective(nnx.merge(graph, p, rest), images, jax.random.key(0))
    gradient = jax.jit(jax.grad(loss))(params)
    moved = {path for path, g in nnx.to_flat_state(gradient) if float(jnp.abs(g[...]).max()) > 0}
    learns = {path for path, _ in nnx.to_flat_state(nnx.state(model, SELF_SUPERVISED_PATH))}
    assert moved == learns
    assert {path[0] for path in learns} == {"shared", "auxiliary"}
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, SHARED))} == {"shared"}


def test_channels_that_groups_do_not_divide_are_refused():
    with pytest.raises(InputError, match="8 groups"):
        small_conv_net(features=12, rngs=nnx.Rngs(0))
