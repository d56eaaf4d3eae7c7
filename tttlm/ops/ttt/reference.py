"""The definition: for every token `jax.grad` of the inner loss, and the weights of that token, materialised.

Slow on purpose; every faster implementation is tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from tttlm.ops.documents import Documents, num_positions
from tttlm.ops.ttt.model import activation
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState

Weights = tuple[InnerLayer, ...]


def inner_model(weights: Weights, x: Float[Array, "K"]) -> Float[Array, "K"]:
    """`f(x; W)` of one head and one token, without the LayerNorm."""
    for i, layer in enumerate(weights):
        x = activation(x) if i else x
        x = x @ layer.kernel
        x = x if layer.bias is None else x + layer.bias
    return x


def reference(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    learning_rates: Float[Array, "B T H"],
    token_scale: Float[Array, "M"],
    weights: Weights,
    norm: InnerNorm | None,
    *,
    state: InnerState,
    docs: Documents | None,
    eps: float,
) -> tuple[Float[Array, "B T H K"], InnerState]:
    """See `tttlm.ops.ttt.ttt_scan`."""
    mini_batch = token_scale.shape[0]

    def read_out(w: Weights, x: Float[Array, "K"], n: InnerNorm | None) -> Float[Array, "K"]:
        z = inner_model(w, x)
        if n is None:
            return z
        return x + n.scale * (z - jnp.mean(z)) / jnp.sqrt(jnp.var(z) + eps) + n.bias

    def loss(w: Weights, k: Float[Array, "K"], v: Float[Array, "K"], n: InnerNorm | None) -> Float[Array, ""]:
        return 0.5 * jnp.sum((read_out(w, k, n) - v) ** 2)

    per_head = (0, 0, 0, 0)
    gradient = jax.vmap(jax.vmap(jax.grad(loss), per_head), (0, 0, 0, None))  # over heads, over rows
    outputs_of = jax.vmap(jax.vmap(read_out, per_head[:3]), (0, 0, None))

    def token(carry, inputs):
        start, accumulated, offset = carry
        q, k, v, rate, is_real, is_start, counts = inputs  # [B, H, K] x 3, [B, H], [B] x 3
        q, k, v = (a.astype(rate.dtype) for a in (q, k, v))

        # A new document begins with the initial weights and nothing accumulated.
        start = _select(is_start, weights, start)
        accumulated = _select(is_start, jax.tree.map(jnp.zeros_like, weights), accumulated)

        rate = jnp.where(is_real[:, None], rate, 0)
        step = jax.tree.map(lambda g: _expand(rate, g) * g, gradient(start, k, v, norm))
        accumulated = jax.tree.map(jnp.add, accumulated, step)
        scale = token_scale[offset]
        current = jax.tree.map(lambda w, a: w - _expand(scale, a) * a, start, accumulated)
        out = outputs_of(current, q, norm)

        full = counts & (offset == mini_batch - 1)
        start = _select(full, current, start)
        accumulated = _select(full, jax.tree.map(jnp.zeros_like, weights), accumulated)
        return (start, accumulated, (offset + counts) % mini_batch), out

    batch, time = queries.shape[:2]
    real = jnp.ones((batch, time), bool) if docs is None else docs.real
    starts = jnp.zeros((batch, time), bool) if docs is None else docs.start
    positions = jnp.broadcast_to(num_positions(docs, time), (batch,))
    counts = jnp.arange(time) < positions[:, None]
    inputs = (queries, keys, values, learning_rates, real, starts, counts)
    by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), inputs)
    (start, accumulated, offset), outputs = jax.lax.scan(token, (*state[:2], state.offset), by_time)
    return jnp.moveaxis(outputs, 0, 1), InnerState(start, accumulated, offset, state.document)


def _expand(a: Shaped[Array, "*S"], like: Shaped[Array, "*R"]) -> Shaped[Array, "*Q"]:
    """`a` with axes of size one behind its own, to multiply `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def _select(rows, new, old):
    """`new` in those rows, `old` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(_expand(rows, b), a, b), new, old)
