"""What happens inside: how well the inner model learns, and how far it moves, along a sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.documents import documents
from tttlm.ops.ttt.model import activation, layer_norm
from tttlm.ops.ttt.scan import ttt_scan
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, init_inner_state

QUARTERS = 4


class InnerStatistics(NamedTuple):
    """Means over rows and heads, and over the tokens of whole mini-batches.

    Attributes:
        loss_before: the inner loss of a token at the weights that its mini-batch starts from.
        loss_after: the same at the weights that leave its mini-batch.
        learning_rate: the inner learning rate by which a token's gradient enters those, `token_scale[M-1] rate[s]`.
        weight_norm: the Frobenius norm of a head's inner weights, all layers and biases, at the end of the row.
        drift: the norm of their difference from the initial weights after a quarter, a half, three quarters of the row,
            and at its end.
    """

    loss_before: Float[Array, ""]
    loss_after: Float[Array, ""]
    learning_rate: Float[Array, ""]
    weight_norm: Float[Array, ""]
    drift: Float[Array, "4"]


def inner_statistics(
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    learning_rates: Float[Array, "B T H"],
    token_scale: Float[Array, "M"],
    weights: tuple[InnerLayer, ...],
    norm: InnerNorm | None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    eps: float = 1e-6,
) -> InnerStatistics:
    """Statistics of `ttt_scan` from its initial state; arguments as there.

    Padding does not count, nor do mini-batches in which a document starts after the first token, nor a last one that
    is not full. A new document starts from the initial weights, and its drift with it.

    Raises:
        ValueError: the sequence is shorter than a mini-batch.
    """
    (batch, time), size = keys.shape[:2], token_scale.shape[0]
    count = time // size
    if not count:
        raise ValueError(f"statistics need a whole mini-batch, got {time} tokens for mini-batches of {size}")
    inputs = (keys, values, learning_rates, token_scale, weights, norm)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(inputs))
    keys, values, learning_rates, token_scale, weights, norm = jax.tree.map(lambda a: a.astype(dtype), inputs)
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids

    def by_mini_batch(a: Array) -> Array:
        return a[:, : count * size].reshape(batch, count, size, *a.shape[2:]).swapaxes(0, 1)

    def step(state, xs):
        k, v, rates, segments = xs
        docs = documents(segments, state.document)
        assert docs is not None
        fresh = docs.start[:, 0]
        start = jax.tree.map(lambda w, s: jnp.where(_behind(fresh, s), w, s), weights, state.weights)
        _, after = ttt_scan(
            k,
            k,
            v,
            rates,
            token_scale,
            weights,
            norm,
            state=state,
            segment_ids=segments,
            eps=eps,
            implementation="dual",
        )
        counted = docs.real & jnp.all(docs.index == docs.index[:, :1], axis=1, keepdims=True)  # [B M]
        sums = [
            jnp.sum(jnp.where(counted[..., None], values, 0))
            for values in (
                _loss(start, norm, k, v, eps),
                _loss(after.weights, norm, k, v, eps),
                rates * token_scale[-1],
            )
        ]
        moved = jax.tree.map(jnp.subtract, after.weights, jax.tree.map(lambda w: w[None], weights))
        return after, (*sums, jnp.sum(counted) * k.shape[2], _norm(after.weights), _norm(moved))

    xs = jax.tree.map(by_mini_batch, (keys, values, learning_rates, segments))
    _, (before, after, rates, counted, norms, drift) = jax.lax.scan(step, init_inner_state(weights, batch), xs)
    tokens = jnp.maximum(jnp.sum(counted), 1)
    places = jnp.array([-(-count * quarter // QUARTERS) - 1 for quarter in range(1, QUARTERS + 1)])
    means = (jnp.sum(before) / tokens, jnp.sum(after) / tokens, jnp.sum(rates) / tokens)
    return InnerStatistics(*means, norms[-1], drift[places])


def _loss(weights, norm: InnerNorm | None, k, v, eps: float) -> Float[Array, "B M H"]:
    """`|k + LN(f(k; W)) - v|^2 / 2` of every token, with weights `[B, H, ...]`."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B H M K]
    x = k
    for i, layer in enumerate(weights):
        x = (activation(x) if i else x) @ layer.kernel
        x = x if layer.bias is None else x + layer.bias[..., None, :]
    if norm is not None:
        x = k + layer_norm(x, norm.scale[:, None], norm.bias[:, None], eps)
    return 0.5 * jnp.sum((x - v) ** 2, axis=-1).swapaxes(1, 2)


def _norm(weights) -> Float[Array, ""]:
    """The mean over rows and heads of the norm of all inner weights of a head."""
    return jnp.mean(jnp.sqrt(sum(jnp.sum(w**2, axis=tuple(range(2, w.ndim))) for w in jax.tree.leaves(weights))))


def _behind(rows, like):
    """`rows` `[B]` with axes behind its own, to choose among `like`."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - 1))
