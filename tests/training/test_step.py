"""One step: batches in parts, faults that change nothing, and the mesh of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.small import small_config
from tttlm.data import Batch
from tttlm.training.sharding import make_mesh
from tttlm.training.step import Model, batch_gradient, init_state, make_train_step, total_weight

ROWS, LENGTH = 4, 32


def batch(seed: int = 0, **more: np.ndarray) -> Batch[np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 300, (ROWS, LENGTH + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], **more)


@pytest.fixture(scope="module")
def params():
    config = small_config()
    return jax.tree.map(np.asarray, init_state(config, Model(config.model)).params)


@pytest.mark.long
def test_a_batch_taken_in_parts_has_the_gradient_of_the_whole(params, x64):
    weights = np.random.default_rng(1).integers(0, 2, (ROWS, LENGTH)).astype(np.float64)
    rows = batch(weights=weights)
    params = jax.tree.map(lambda x: x.astype(np.float64), params)

    def gradient(accumulate: int):
        config = small_config(accumulate=accumulate, **{"model.dtype": "float64", "model.param_dtype": "float64"})
        model = Model(config.model)
        return jax.jit(lambda p, b: batch_gradient(config, model, p, b, jnp.float64(1.0))[:3])(params, rows)

    whole, parts = gradient(1), gradient(2)
    assert whole[1] == weights.sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), whole, parts)


@pytest.mark.long
def test_a_faulty_step_leaves_the_state_as_it_was_and_halts_unless_told_to_skip(params):
    bad = batch(weights=np.full((ROWS, LENGTH), np.nan, np.float32))
    good = batch(1, weights=np.ones((ROWS, LENGTH), np.float32))
    for policy, goes_on in (("stop", False), ("skip", True)):
        config = small_config(**{"faults.policy": policy})
        model = Model(config.model)
        step = make_train_step(config, model, make_mesh(config.mesh))
        state, numbers = step(init_state(config, model), bad)
        assert not numbers["good"]
        assert (int(state.step), int(state.batch)) == (1, 1)
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
        assert all(not np.any(x) for x in jax.tree.leaves(optax.tree.get(state.opt_state, "mu")))
        state, numbers = step(state, good)
        changed = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True))
        assert changed == goes_on


def test_the_loss_counts_every_target_unless_weights_say_otherwise():
    assert total_weight(batch()) == ROWS * LENGTH
    assert total_weight(batch(weights=np.eye(ROWS, LENGTH, dtype=np.float32))) == ROWS
