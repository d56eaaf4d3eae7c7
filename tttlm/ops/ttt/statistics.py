"""Statistics of a learner along a sequence: its losses, and the drift of its weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.errors import InputError
from tttlm.ops.documents import documents
from tttlm.ops.ttt.description import Learner, Ridge
from tttlm.ops.ttt.learn import learn
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, init_learner_state, read_weights
from tttlm.ops.ttt.models import prediction
from tttlm.ops.ttt.problem import select
from tttlm.ops.ttt.systems import solve_positive

QUARTERS = 4
STRETCH = 16  # tokens between two measurements of the weights, if no clock decides


class InnerStatistics(NamedTuple):
    """Means over sequences and heads, and over the tokens of complete mini-batches.

    Attributes:
        loss_before: the inner loss of a token at the weights before its mini-batch.
        loss_after: the same at the weights after its mini-batch.
        learning_rate: the inner learning rate of a token's gradient in that update, `token_scale[M-1] rate[s]`.
        weight_norm: the Frobenius norm of a head's inner weights, all layers and biases, at the end of the sequence.
        drift: the norm of their difference from the initial weights after a quarter, a half, three quarters of the
            sequence, and at its end.
    """

    loss_before: Float[Array, ""]
    loss_after: Float[Array, ""]
    learning_rate: Float[Array, ""]
    weight_norm: Float[Array, ""]
    drift: Float[Array, "4"]


def learner_statistics(
    learner: Learner,
    inputs: LearnerInputs,
    weights: Any,
    *,
    slow: Any = None,
    position_scale: Float[Array, "M"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> InnerStatistics:
    """Statistics of `learn` from its initial state; arguments as there.

    The sequence is divided into stretches of `learner.clocks.period` tokens, or of 16 if that is 1: losses are those of
    a stretch's tokens at the weights before and after it, as queries read them. Padding is excluded, and so are
    stretches in which a document starts after the first token, and an incomplete last one. The learning rate is the
    mean of the rates, times the last position scale if there is one; 1 if a learner has no rates.

    Raises:
        InputError: the sequence is shorter than a stretch.
    """
    (batch, time, _, key_dim), value_dim = inputs.queries.shape, inputs.values.shape[-1]
    size, writes = learner.clocks.period, learner.clocks.writes_per_token
    size = STRETCH if size == 1 else size
    count = time // size
    if not count:
        raise InputError(f"statistics need {size} tokens, a period of the learner's clocks, got {time}")
    inputs, weights, slow, position_scale = _promoted(inputs, weights, slow, position_scale)
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    initial = init_learner_state(learner, weights, batch, key_dim, value_dim)

    def by_stretch(a: Array) -> Array:  # [B, T n, ...] to [N, B, size n, ...]
        each = size * (a.shape[1] // time)
        return a[:, : count * each].reshape(batch, count, each, *a.shape[2:]).swapaxes(0, 1)

    def step(state: LearnerState, xs: tuple[LearnerInputs, Array]) -> tuple[LearnerState, tuple]:
        x, segments = xs
        docs = documents(segments, state.document)
        assert docs is not None
        again = docs.start[:, 0] | (learner.clocks.reset is not None)
        start = select(again, _read(learner, initial, weights, slow), _read(learner, state, weights, slow))
        _, after = learn(
            learner, x, weights, slow=slow, position_scale=position_scale, state=state, segment_ids=segments
        )
        end = _read(learner, after, weights, slow)
        counted = docs.real & jnp.all(docs.index == docs.index[:, :1], axis=1, keepdims=True)
        counted = jnp.repeat(counted, writes, axis=1)[:, :, None]  # [B, size n, 1]
        sums = [jnp.sum(jnp.where(counted, a, 0)) for a in (_losses(learner, w, slow, x) for w in (start, end))]
        rates = jnp.sum(jnp.where(counted, _rates(x, position_scale), 0))
        moved = jax.tree.map(jnp.subtract, end, _read(learner, initial, weights, slow))
        return after, (*sums, rates, jnp.sum(counted) * x.keys.shape[2], _norm(end), _norm(moved))

    xs = jax.tree.map(by_stretch, (inputs, segments))
    _, (before, after, rates, counted, norms, drift) = jax.lax.scan(step, initial, xs)
    tokens = jnp.maximum(jnp.sum(counted), 1)
    quarters = jnp.array([-(-count * quarter // QUARTERS) - 1 for quarter in range(1, QUARTERS + 1)])
    means = (jnp.sum(before) / tokens, jnp.sum(after) / tokens, jnp.sum(rates) / tokens)
    return InnerStatistics(*means, norms[-1], drift[quarters])


def _promoted(*trees: Any) -> Any:
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(trees))
    return jax.tree.map(lambda a: a.astype(dtype), trees)


def _read(learner: Learner, state: LearnerState, weights: Any, slow: Any) -> Any:
    """The weights that queries read, of every sequence and head."""
    if isinstance(learner.optimizer, Ridge):
        ridge = jax.vmap(jnp.diag)(slow)
        return (jax.vmap(jax.vmap(solve_positive))(state.weights.kk + ridge, state.weights.kv),)
    if not learner.link_initial:
        return state.anchor
    of_head = lambda accumulated, initial: read_weights(learner, accumulated, initial)
    return jax.vmap(jax.vmap(of_head), (0, None))(state.weights, weights)


def _losses(learner: Learner, read: Any, slow: Any, x: LearnerInputs) -> Float[Array, "B Tn H"]:
    """The loss of every write at these weights."""
    if isinstance(learner.optimizer, Ridge):
        predict, slow = (lambda w, slow, k: k @ w[0]), None
    else:
        predict = prediction(learner.model)
    keys = x.keys if x.error_keys is None else x.error_keys
    of_token = lambda w, s, k, v: learner.loss(predict(w, s, k), v)
    over_heads = jax.vmap(of_token, (0, None if slow is None else 0, 0, 0))
    over_tokens = jax.vmap(over_heads, (None, None, 0, 0))
    return jax.vmap(over_tokens, (0, None, 0, 0))(read, slow, keys, x.values)


def _rates(x: LearnerInputs, position_scale: Array | None) -> Float[Array, "B Tn H"]:
    """The rate of every write, the mean if there are several."""
    ones = jnp.ones(x.keys.shape[:3], x.keys.dtype)
    leaves = [a.reshape(*ones.shape, -1).mean(-1) for a in jax.tree.leaves(x.rates)]
    rates = sum(leaves) / len(leaves) if leaves else ones
    return rates if position_scale is None else rates * position_scale[-1]


def _norm(weights: Any) -> Float[Array, ""]:
    """The mean over sequences and heads of the norm of all inner weights of a head."""
    return jnp.mean(jnp.sqrt(sum(jnp.sum(w**2, axis=tuple(range(2, w.ndim))) for w in jax.tree.leaves(weights))))
