"""No NaN where the definition has none: gates and rates at their limits, keys of zero, long sequences in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.learners import H, K, make, piece
from tttlm.ops.ttt import learn, published
from tttlm.ops.ttt.transforms import InitialNorm, Muon, factor, one_minus

M = 16
ALWAYS = {
    "gated_deltanet": published.delta_rule(gate=True),
    "gla": published.linear_attention(gate=True, per_channel=True),
    "mesanet": published.mesanet(),
    "titans_linear": published.titans((), M),
    "titans_pytorch_muon": published.neural_memory(6, M, muon=True),
    "lact_muon": published.lact(6, M, momentum=True, muon=True),
    "atlas": published.atlas((6,), 3, M),
}
LEARNERS = ALWAYS | {
    "ttt_mlp": published.ttt((6,), M),
    "kda": published.delta_rule(gate=True, per_channel=True),
    "gated_deltaproduct": published.delta_rule(gate=True, writes_per_token=2),
    "comba": published.comba(),
    "longhorn": published.longhorn(),
    "longhorn_diagonal": published.longhorn(diagonal=True),
    "titans_mlp": published.titans((6,), M),
    "lact_prenorm": published.lact(6, M, momentum=True, muon=True, prenorm=True),
    "inplace_ttt": published.inplace_ttt(M),
    "tnt_local": published.tnt((6,), M, (M,), (2 * M,))[1],
    "omeganet": published.omega((), 3, M),
}
NAMES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in LEARNERS]
# What gates are made from at their limits: forget all, and keep all, by turns.
LIMITS = {factor: (0.0, 1.0), one_minus: (1.0, 0.0), jnp.exp: (-1e4, 0.0)}
# The largest rates with which the definition does not grow without a bound, for unit keys; else rates stay.
LARGEST_RATES = {"gated_deltanet": 2.0, "kda": 2.0, "gated_deltaproduct": 2.0}
LARGEST_RATES |= {"mesanet": 1e4, "longhorn": 1e4, "longhorn_diagonal": 1e4}

# Gradients through Newton-Schulz steps grow with their number: those of LaCT at 8k tokens are 1e48 in float64.
GROWING = ("lact_muon", "atlas")


def at_limits(gate, like, period):
    if gate is None:
        return None
    none, full = LIMITS.get(gate.activation, (-1e4, 1e4))
    turns = (jnp.arange(like.shape[1]) % period == 0).reshape(1, -1, *(1,) * (like.ndim - 2))
    return jnp.where(turns, none, full).astype(like.dtype) * jnp.ones_like(like)


def adversarial(name, inputs):
    """Gates at their limits, and some rates and keys of zero, others with the largest rates."""
    optimizer, time = LEARNERS[name].optimizer, inputs.keys.shape[1]
    turn = (jnp.arange(time) % 5)[None, :, None]
    by = lambda a: turn.reshape(1, -1, 1, *(1,) * (a.ndim - 3))
    quiet = lambda a: jnp.where(by(a) < 2, 0, a)
    loud = lambda a: jnp.where(by(a) == 4, LARGEST_RATES.get(name, a), a).astype(a.dtype)
    return inputs._replace(
        keys=quiet(inputs.keys),
        rates=jax.tree.map(lambda a: quiet(loud(a)), inputs.rates),
        decay=at_limits(optimizer.decay, inputs.decay, 3),
        momentum=at_limits(getattr(optimizer, "momentum", None), inputs.momentum, 4),
    )


def value_and_gradients(learner, options):
    def score(inputs, weights):
        out, state = learn(learner, inputs, weights, **options)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), (out, state)

    return jax.jit(jax.value_and_grad(score, (0, 1), has_aux=True))


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert jnp.all(jnp.isfinite(leaf)), jax.tree_util.keystr(path)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_at_the_limits_of_gates_rates_and_keys_outputs_and_gradients_are_finite(name):
    inputs, weights, options = make(LEARNERS[name], batch=1, time=2 * M, dtype=np.float32)
    assert_finite(value_and_gradients(LEARNERS[name], options)(adversarial(name, inputs), weights))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "adversarial"])
@pytest.mark.parametrize("name", LEARNERS)
def test_of_8k_tokens_in_bfloat16_outputs_and_gradients_are_finite_and_the_state_is_float32(name, kind):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner, batch=1, time=8192, dtype=np.float32)
    # What grows without a bound by its definition is kept from it: rates as layers make them.
    inputs = inputs._replace(rates=jax.tree.map(lambda a: 0.1 * a, inputs.rates))
    inputs = adversarial(name, inputs) if kind == "adversarial" else inputs
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), inputs)
    out, state = jax.jit(lambda inputs, weights: learn(learner, inputs, weights, **options))(narrow, weights)
    assert_finite((out, state))
    assert out.dtype == jnp.bfloat16
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype("float32")}
    first = piece(learner, narrow, 0, 512 if name in GROWING else 8192)
    assert_finite(value_and_gradients(learner, options)(first, weights))


def test_what_is_zero_has_a_gradient_of_zero_not_nan():
    zeros = {"kernel": jnp.zeros((H, K)), "bias": jnp.zeros(K)}
    for function in (Muon(), Muon(clamp=True), lambda tree: InitialNorm()(tree, tree)):
        gradient = jax.grad(lambda tree, f=function: sum(jnp.sum(a) for a in jax.tree.leaves(f(tree))))(zeros)
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(gradient))
