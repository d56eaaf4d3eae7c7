"""The optimiser: what decays, how its rates go, and what the inner learning rate is multiplied by."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.small import small_config
from tttlm.training.config import OptimizerConfig
from tttlm.training.optimizer import (
    at_step,
    decay_mask,
    direction,
    inner_multiplier,
    learning_rate,
    make_optimizer,
    muon_dimensions,
)
from tttlm.training.sharding import path_name
from tttlm.training.step import Model

METHODS = ("adamw", "adam", "lion", "muon", "adafactor")


def test_rate_rises_linearly_then_falls_along_a_cosine_to_its_final_value():
    config = small_config(**{"steps": 100, "schedule.warmup_steps": 10, "schedule.final": 1e-5})
    peak = config.optimizer.learning_rate
    rates = [float(learning_rate(config)(step)) for step in range(100)]
    assert rates[:10] == pytest.approx([peak * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(peak)
    assert rates[10 + 89 // 2] + rates[10 + 89 - 89 // 2] == pytest.approx(peak + 1e-5, rel=1e-4)
    assert rates[99] == pytest.approx(1e-5, rel=1e-4)
    assert all(a > b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize("warmup", [0, 1, 2, 100])
@pytest.mark.parametrize("start", ["one_step", "zero"])
def test_every_warm_up_that_fits_a_run_has_a_rate_at_every_step(warmup, start):
    config = small_config(**{"steps": 100, "schedule.warmup_steps": warmup, "schedule.warmup_start": start})
    rates = np.array([float(learning_rate(config)(step)) for step in range(100)])
    assert np.isfinite(rates).all()
    assert rates.max() <= config.optimizer.learning_rate * 1.000001
    assert (rates[1:] > 0).all()
    assert (rates[0] == 0) == (start == "zero" and warmup > 0)


def test_a_warm_up_from_zero_is_that_of_the_official_trainer():
    """Its first update has rate 0, its n-th peak n / warm-up steps, its last is one update short of the final rate."""
    config = small_config(**{"steps": 100, "schedule.warmup_steps": 10, "schedule.warmup_start": "zero"})
    peak, final = config.optimizer.learning_rate, config.schedule.final
    official = optax.warmup_cosine_decay_schedule(0.0, peak, 10, 100, final)
    rates = [float(learning_rate(config)(step)) for step in range(100)]
    assert rates == [float(official(step)) for step in range(100)]
    assert rates[:11] == pytest.approx([peak * step / 10 for step in range(11)])
    assert final < rates[99] < final + 1e-3 * peak


def test_inner_rate_of_ttt_mlp_warms_up_from_a_tenth_over_a_tenth_of_the_run():
    config = small_config(**{"steps": 100, "model.mixers": ("ttt_mlp",)})
    multipliers = [float(inner_multiplier(config, step)) for step in (0, 5, 10, 99)]
    assert multipliers == pytest.approx([0.1, 0.55, 1.0, 1.0])
    linear = small_config(**{"steps": 100, "model.mixers": ("ttt_linear",)})
    assert float(inner_multiplier(linear, 0)) == 1.0


def of_ttt_mlp() -> dict:
    return Model(small_config(**{"model.mixers": ("ttt_mlp",), "model.num_layers": 2}).model).shapes


def by_name(tree, **options) -> dict:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, **options)}


def test_matrices_decay_and_vectors_do_not_however_they_are_stacked():
    mask = by_name(decay_mask(OptimizerConfig())(of_ttt_mlp()))
    assert mask["embed/embedding"]
    for name, decays in mask.items():
        vector = name.endswith(("bias", "scale", "token_scale"))
        assert decays != vector, name
    assert mask["stack/blocks/0/mixer/inner/0/kernel"]
    assert not mask["stack/blocks/0/mixer/inner/0/bias"]


def test_every_parameter_decays_where_that_is_chosen():
    config = small_config(**{"optimizer.decay": "all", "optimizer.weight_decay": 0.1, "steps": 100})
    params = jax.tree.map(lambda x: jnp.ones(x.shape), of_ttt_mlp())
    optimizer, zero = make_optimizer(config), jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda zero, params: optimizer.update(zero, optimizer.init(params), params)[0])(zero, params)
    rate = float(learning_rate(config)(0))
    for name, update in by_name(updates).items():
        np.testing.assert_allclose(update, -rate * 0.1, rtol=1e-6, err_msg=name)


def test_update_is_adamw_with_a_clipped_gradient(x64):
    changes = {"clip": 1.0, "weight_decay": 0.1, "eps": 0.0, "learning_rate": 1.0}
    changes = {f"optimizer.{name}": value for name, value in changes.items()}
    config = small_config(**changes, **{"schedule.warmup_steps": 0})
    params = {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.array([[30.0, 0.0]]), "bias": jnp.array([-40.0])}
    optimizer = make_optimizer(config)
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)
    # The first step of Adam has the size of 1 in the direction of the gradient, whatever it was clipped to.
    assert updates["kernel"][0, 0] == pytest.approx(-(1.0 + 0.1 * 2.0))
    assert updates["bias"][0] == pytest.approx(1.0)
    (mean,) = (x for x in jax.tree.leaves(opt_state) if x.shape == (1,) and x[0] < 0)
    assert mean[0] == pytest.approx(0.1 * -40.0 / 50.0)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_adamw_has_the_numbers_of_its_definition(x64, dtype):
    """arXiv 1711.05101, algorithm 2, written out; the rate is not rounded to the dtype of the parameters."""
    config = small_config(**{"optimizer.clip": 0.0, "steps": 10, "optimizer.learning_rate": 0.0123})
    o, rng = config.optimizer, np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype)}
    optimizer = make_optimizer(config)
    opt_state, theta = optimizer.init(params), np.asarray(params["kernel"], np.float64)
    m = v = np.zeros_like(theta)
    for t in range(1, 6):
        grads = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype)}
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["kernel"], np.float64)
        m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g * g
        step = m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps) + o.weight_decay * theta
        theta = theta - float(learning_rate(config)(t - 1)) * step
    tolerance = 1e-7 if dtype == "float64" else 0.03
    np.testing.assert_allclose(np.asarray(params["kernel"], np.float64), theta, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_down_at_a_rate_that_means_about_the_same(name):
    """The root mean square of its direction is near that of Adam, so that one learning rate suits all."""
    config = OptimizerConfig(name=name)
    rng = np.random.default_rng(0)
    target = {"q_proj": {"kernel": rng.normal(size=(16, 32))}, "bias": rng.normal(size=(32,))}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), target)
    method, losses = direction(config), []
    state, update = method.init(params), jax.jit(method.update)
    for _ in range(60):
        grads = jax.tree.map(lambda p, t: p - t, params, target)
        losses.append(float(optax.tree.norm(grads)))
        updates, state = update(grads, state, params)
        assert 0.02 < float(jnp.sqrt(jnp.mean(updates["q_proj"]["kernel"] ** 2))) < 2.0
        params = jax.tree.map(lambda p, u: p - 0.02 * u, params, updates)
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(losses))


def test_muon_takes_kernels_of_blocks_and_heads_as_matrices_and_leaves_the_rest_to_adam():
    dimensions = by_name(muon_dimensions(of_ttt_mlp()), is_leaf=lambda x: x is None or hasattr(x, "output_axis"))
    assert dimensions["stack/blocks/0/mixer/q_proj/kernel"] == (1, 2)
    assert dimensions["stack/blocks/0/mixer/inner/0/kernel"] == (2, 3)  # [repeats, heads, in, out]
    for name in ("embed/embedding", "norm/scale", "stack/blocks/0/conv/kernel", "stack/blocks/0/mixer/inner/0/bias"):
        assert dimensions[name] is None


@pytest.mark.parametrize("name", METHODS)
def test_the_schedule_follows_the_run_through_skipped_updates(name):
    config = small_config(**{"optimizer.name": name, "optimizer.weight_decay": 0.0, "steps": 100})
    params = {"q_proj": {"kernel": jnp.ones((4, 4))}}
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    here = at_step(state, jnp.int32(7))
    counts = [int(count) for _, count in optax.tree.get_all_with_path(here, "count")]
    assert 7 in counts  # of the schedule
    others = [(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(here), strict=True) if np.any(a != b)]
    assert len(others) == 1
    ratio = [optimizer.update(params, at_step(state, jnp.int32(step)), params)[0] for step in (1, 3)]
    rates = [float(learning_rate(config)(step)) for step in (1, 3)]
    early, late = (updates["q_proj"]["kernel"] for updates in ratio)
    np.testing.assert_allclose(late, early * rates[1] / rates[0], rtol=1e-5)
