"""The optimiser: what decays, how its rates go, and what the inner learning rate is multiplied by."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest

from tests.training.small import small_config
from tttlm.training.config import OptimizerConfig
from tttlm.training.optimizer import decay_mask, inner_multiplier, learning_rate, make_optimizer
from tttlm.training.sharding import path_name
from tttlm.training.step import Model


def test_rate_rises_linearly_then_falls_along_a_cosine_to_its_final_value():
    config = small_config(**{"steps": 100, "schedule.warmup_steps": 10, "schedule.final": 1e-5})
    peak = config.optimizer.learning_rate
    rates = [float(learning_rate(config, step)) for step in range(100)]
    assert rates[:10] == pytest.approx([peak * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(peak)
    assert rates[10 + 89 // 2] + rates[10 + 89 - 89 // 2] == pytest.approx(peak + 1e-5, rel=1e-4)
    assert rates[99] == pytest.approx(1e-5, rel=1e-4)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_inner_rate_of_ttt_mlp_warms_up_from_a_tenth_over_a_tenth_of_the_run():
    config = small_config(**{"steps": 100, "model.mixers": ("ttt_mlp",)})
    multipliers = [float(inner_multiplier(config, step)) for step in (0, 5, 10, 99)]
    assert multipliers == pytest.approx([0.1, 0.55, 1.0, 1.0])
    linear = small_config(**{"steps": 100, "model.mixers": ("ttt_linear",)})
    assert float(inner_multiplier(linear, 0)) == 1.0


def test_matrices_decay_and_vectors_do_not_however_they_are_stacked():
    params = Model(small_config(**{"model.mixers": ("ttt_mlp",), "model.num_layers": 2}).model).shapes
    mask = {path_name(path): decays for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))}
    assert mask["embed/embedding"]
    for name, decays in mask.items():
        vector = name.endswith(("bias", "scale", "token_scale"))
        assert decays != vector, name
    assert mask["stack/blocks/0/mixer/inner/0/kernel"]
    assert not mask["stack/blocks/0/mixer/inner/0/bias"]


def test_update_is_adamw_with_a_clipped_gradient(x64):
    config = OptimizerConfig(clip=1.0, weight_decay=0.1, eps=0.0)
    params = {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.array([[30.0, 0.0]]), "bias": jnp.array([-40.0])}
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    # The first step of Adam has the size of 1 in the direction of the gradient, whatever it was clipped to.
    assert updates["kernel"][0, 0] == pytest.approx(1.0 + 0.1 * 2.0)
    assert updates["bias"][0] == pytest.approx(-1.0)
    (mean,) = (x for x in jax.tree.leaves(opt_state) if x.shape == (1,) and x[0] < 0)
    assert mean[0] == pytest.approx(0.1 * -40.0 / 50.0)
