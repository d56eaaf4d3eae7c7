"""A faulty step is traced to the first thing in it that went wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.small import small_config
from tttlm.data import Batch
from tttlm.training.diagnosis import diagnose
from tttlm.training.step import Model, init_state

MODEL = {"model.mixers": ("attention", "ttt_linear"), "model.ttt.mini_batch_size": 8}
CONFIG = small_config(**MODEL)


@pytest.fixture(scope="module")
def healthy():
    model = Model(CONFIG.model)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 33)).astype(np.int32)
    batch = Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    return model, init_state(CONFIG, model).params, batch


def changed(params, path: str, value):
    """`params` with `value` in the place of what is at `path`, of the first block."""
    *names, last = path.split("/")
    params = jax.tree.map(lambda x: x, params)
    at = params
    for name in names:
        at = at[int(name) if name.isdigit() else name]
    at[last] = value(at[last])
    return params


TTT = "stack/blocks/1/mixer"


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (f"{TTT}/o_proj/kernel", np.nan, "parameter stack/blocks/1/mixer/o_proj/kernel is the first"),
        (f"{TTT}/inner_norm/scale", 3e38, "the state of layer 1 (ttt_linear), mixer/inner/"),
        # The loss is the square of the values, so it is the first to overflow.
        (f"{TTT}/v_proj/kernel", 1e22, "the inner loss of layer 1 (ttt_linear) is the first"),
        ("stack/blocks/1/feed_forward_norm/scale", 3e38, "the activations of layer 1 (ttt_linear) are the first"),
        ("stack/blocks/0/feed_forward_norm/scale", 3e38, "the activations of layer 0 (attention) are the first"),
    ],
)
def test_the_first_that_is_not_finite_is_named(healthy, path, value, says):
    model, params, batch = healthy
    assert says in diagnose(CONFIG, model, changed(params, path, lambda x: x * value), batch, 1)


@pytest.mark.long
def test_where_all_is_finite_the_largest_gradient_and_a_growing_inner_loss_are_named(healthy):
    model, params, batch = healthy
    said = diagnose(CONFIG, model, params, batch, 1)
    assert said.startswith("everything is finite; the largest gradient is of ")
    assert "inner loss" not in said

    # Without a norm within it, an inner model that steps too far diverges.
    config = small_config(**MODEL, **{"model.ttt.inner_norm": False})
    model = Model(config.model)
    far = changed(init_state(config, model).params, f"{TTT}/token_scale", lambda x: x + 1e4)
    said = diagnose(config, model, far, batch, 1)
    assert "; the inner loss of layer 1 (ttt_linear) grows in its update, from " in said
