"""No NaN where the definition has none: gates and rates at their limits, keys of zero, long sequences in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.learners import H, K, make
from tttlm.ops.ttt import learn, published
from tttlm.ops.ttt.transforms import InitialNorm, Muon, factor, one_minus

M = 16
LEARNERS = {
    "gated_deltanet": published.delta_rule(gate=True),
    "kda": published.delta_rule(gate=True, per_channel=True),
    "gla": published.linear_attention(gate=True, per_channel=True),
    "comba": published.comba(),
    "mesanet": published.mesanet(),
    "longhorn": published.longhorn(),
    "titans_linear": published.titans((), M),
    "titans_pytorch_muon": published.neural_memory(6, M, muon=True),
    "lact_muon": published.lact(6, M, momentum=True, muon=True),
    "atlas": published.atlas((6,), 3, M),
}
# What gates are made from at their limits: forget all, and keep all, by turns.
LIMITS = {factor: (0.0, 1.0), one_minus: (1.0, 0.0), jnp.exp: (-1e4, 0.0)}


def at_limits(gate, like, period):
    if gate is None:
        return None
    none, full = LIMITS.get(gate.activation, (-1e4, 1e4))
    turns = (jnp.arange(like.shape[1]) % period == 0).reshape(1, -1, *(1,) * (like.ndim - 2))
    return jnp.where(turns, none, full).astype(like.dtype) * jnp.ones_like(like)


@pytest.mark.parametrize("name", LEARNERS)
def test_at_the_limits_of_gates_rates_and_keys_outputs_and_gradients_are_finite(name):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner, batch=1, time=2 * M, dtype=np.float32)
    optimizer = learner.optimizer
    silent = (jnp.arange(2 * M) % 5 < 2)[None, :, None]  # rates and keys of zero
    quiet = lambda a: jnp.where(silent.reshape(1, -1, 1, *(1,) * (a.ndim - 3)), 0, a)
    inputs = inputs._replace(
        keys=quiet(inputs.keys),
        rates=jax.tree.map(quiet, inputs.rates),
        decay=at_limits(optimizer.decay, inputs.decay, 3),
        momentum=at_limits(getattr(optimizer, "momentum", None), inputs.momentum, 4),
    )

    @jax.jit
    def run(inputs, weights):
        score = lambda inputs, weights: jnp.sum(jnp.sin(learn(learner, inputs, weights, **options)[0]))
        return jax.value_and_grad(score, (0, 1))(inputs, weights)

    for path, leaf in jax.tree_util.tree_leaves_with_path(run(inputs, weights)):
        assert jnp.all(jnp.isfinite(leaf)), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_of_8k_tokens_in_bfloat16_outputs_are_finite_and_the_state_is_float32(name):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner, batch=1, time=8192, dtype=np.float32)
    # What grows without a bound by its definition is kept from it: rates as layers make them.
    inputs = inputs._replace(rates=jax.tree.map(lambda a: 0.1 * a, inputs.rates))
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), inputs)
    out, state = jax.jit(lambda *a: learn(learner, *a, **options))(narrow, weights)
    assert out.dtype == jnp.bfloat16
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype("float32")}
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in (out, *floats))


def test_what_is_zero_has_a_gradient_of_zero_not_nan():
    zeros = {"kernel": jnp.zeros((H, K)), "bias": jnp.zeros(K)}
    for function in (Muon(), Muon(clamp=True), lambda tree: InitialNorm()(tree, tree)):
        gradient = jax.grad(lambda tree, f=function: sum(jnp.sum(a) for a in jax.tree.leaves(f(tree))))(zeros)
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(gradient))
