"""The chunked cross-entropy equals the plain one and never holds the logits of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.training.loss import summed_loss, token_losses

B, T, D, V = 2, 12, 8, 31


def make(seed: int = 0, time: int = T):
    rng = np.random.default_rng(seed)
    table, hidden, weights = rng.normal(size=(D, V)), rng.normal(size=(B, time, D)), rng.uniform(size=(B, time))
    return tuple(map(jnp.asarray, (table, hidden, rng.integers(0, V, (B, time)), weights.round(1))))


def test_loss_of_a_token_is_minus_its_log_probability(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)))
    targets = jnp.array([4, 0, 30])
    expected = -np.log(jax.nn.softmax(logits)[np.arange(3), targets])
    np.testing.assert_allclose(token_losses(logits, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 6])
def test_any_chunk_gives_the_same_loss_and_gradients(x64, chunk):
    table, hidden, targets, weights = make()

    def loss(table, hidden, chunk):
        return summed_loss(hidden, table.T, targets, weights, chunk)

    def scaled(table, hidden, chunk):
        return 3 * loss(table, hidden, chunk) + jnp.sum(table**2)

    assert float(loss(table, hidden, chunk)) == pytest.approx(float(loss(table, hidden, 0)), rel=1e-12)
    whole = jax.value_and_grad(scaled, argnums=(0, 1))(table, hidden, 0)
    parts = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)), static_argnums=2)(table, hidden, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), whole, parts)


def test_no_array_of_the_chunked_loss_is_as_large_as_the_logits_of_a_row():
    table, hidden, targets, weights = make(time=8 * T)

    def loss(table, hidden, chunk):
        return summed_loss(hidden, table.T, targets, weights, chunk)

    def largest(chunk: int) -> int:
        text = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2).lower(table, hidden, chunk).compile()
        return text.memory_analysis().temp_size_in_bytes

    assert largest(1) < B * 8 * T * V * 4 < largest(0)


def test_targets_of_weight_zero_do_not_count():
    table, hidden, targets, _ = make()
    weights = jnp.zeros((B, T)).at[0, 3].set(1.0)
    alone = token_losses(hidden[0, 3] @ table, targets[0, 3])
    np.testing.assert_allclose(summed_loss(hidden, table.T, targets, weights), alone, rtol=1e-5)
