"""States that are linear in time: MesaNet's sums with a solve for every token, and diagonal Longhorn.

    MesaNet    A_t = decay A + rate kᵀk,  B_t = decay B + rate kᵀv,  out q (A_t + diag λ)^-1 B_t
    Longhorn   W_ij = (1 - δ_j k_i²) W_ij + δ_j k_i v_j

The states of a chunk are materialised, and computed again for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.ops.ttt.chunks import Chunk, over_chunks
from tttlm.ops.ttt.coefficients import from_start, range_products
from tttlm.ops.ttt.description import Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState
from tttlm.ops.ttt.losses import half_square
from tttlm.ops.ttt.models import DiagonalLinear, RidgeWeights
from tttlm.ops.ttt.problem import Problem, Shapes, select
from tttlm.ops.ttt.systems import solve_positive

CHUNK = 16  # tokens whose states are held at a time


class LinearScan:
    """Scans of linear states, as an implementation."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """One line for all but the exact solve and plain steps of a diagonal linear model."""
        optimizer, clocks = learner.optimizer, learner.clocks
        if isinstance(optimizer, Ridge):
            return None
        if not isinstance(learner.model, DiagonalLinear) or learner.loss is not half_square:
            return "the state is linear in time for Ridge, or a diagonal linear model with half_square loss"
        if (clocks.anchor, clocks.step, clocks.writes_per_token) != (1, 1, 1) or clocks.reset:
            return "the state is linear in time where every token is one step from its own weights, without resets"
        shaped = optimizer.momentum or optimizer.transform or optimizer.step_size or learner.link
        if shaped or optimizer.rate == "matrix" or learner.window > 1 or learner.error_keys:
            return "the state is linear in time without momentum, transform, step size, link, window or error keys"
        if clocks.visible != "at_step" or learner.query_projection:
            return "the scan reads after a token's own write, with the query as it is"
        return None

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """See `tttlm.ops.ttt.learn`."""
        learner, initial = problem.learner, problem.blank.weights
        of_head: Callable = _ridge if isinstance(learner.optimizer, Ridge) else _diagonal

        def one(start: Any, carried: Any, slow: Any, x: LearnerInputs, chunk: Chunk) -> tuple[Any, Array]:
            if chunk.reset is not None:
                carried = select(chunk.reset, start, carried)
            return of_head(learner, start, carried, slow, x, chunk)

        over_heads = jax.vmap(one, (0, 0, 0, 0, None))
        over_rows = jax.vmap(over_heads, (None, 0, None, 0, Chunk(0, 0, 0, 0, 0, 0, None)))  # type: ignore[arg-type]

        def step(carry: LearnerState, x: LearnerInputs, chunk: Chunk) -> tuple[LearnerState, Array]:
            weights, out = over_rows(initial, carry.weights, problem.slow, x, chunk)
            return carry._replace(weights=weights), out

        return over_chunks(problem, CHUNK, step, clocked=False)


def _kept(gate: Gate | None, x: Array | None, chunk: Chunk, dtype: Any) -> Array:
    """What is left of a state after the gate of every token, `[m]` or `[m, K]`; padding keeps all."""
    if gate is None or x is None:
        return jnp.ones(len(chunk.real), dtype)
    kept = gate.activation(x)
    return jnp.where(chunk.real.reshape(-1, *(1,) * (kept.ndim - 1)), kept, 1)


def _ridge(learner, start, carried, slow, x: LearnerInputs, chunk: Chunk):
    keys, values = x.keys[:, 0], x.values[:, 0]
    same, base = jnp.tril(jnp.ones((len(keys),) * 2, bool)), lambda of_carried, of_start: of_carried
    if chunk.document is not None:
        same = same & (chunk.document[:, None] == chunk.document)
        in_new = chunk.document != chunk.document[0]
        base = lambda of_carried, of_start: select(in_new, of_start, of_carried)
    kept = _kept(learner.optimizer.decay, x.decay, chunk, keys.dtype)
    since, weight = from_start(kept, same), range_products(kept, same) * jnp.where(chunk.real, x.rates[:, 0], 0)
    of_all = lambda a: jnp.broadcast_to(a, (len(keys), *a.shape))
    kk = since[:, None, None] * base(of_all(carried.kk), of_all(start.kk))
    kk = kk + jnp.tensordot(weight, keys[:, :, None] * keys[:, None], 1)
    queries = learner.query_scale * x.queries[..., None]
    solved = jax.vmap(solve_positive)(kk + jnp.diag(slow)[None], queries)[..., 0]
    out = since[:, None] * base(solved @ carried.kv, solved @ start.kv) + (weight * (solved @ keys.T)) @ values
    kv = since[-1] * base(of_all(carried.kv), of_all(start.kv))[-1] + (weight[-1, :, None] * keys).T @ values
    return RidgeWeights(kk[-1], kv), out


def _diagonal(learner, start, carried, slow, x: LearnerInputs, chunk: Chunk):
    optimizer: Optimizer = learner.optimizer
    keys, values = x.keys[:, 0], x.values[:, 0]
    rates = jnp.ones((len(keys), 1), keys.dtype) if x.rates is None else x.rates.reshape(len(keys), -1)
    if optimizer.implicit:
        rates = rates / (1 + rates * jnp.sum(keys * keys, -1, keepdims=True))
    rates = jnp.where(chunk.real[:, None], rates, 0)[:, None]  # [m, 1, V]
    kept = _kept(optimizer.decay, x.decay, chunk, keys.dtype).reshape(len(keys), -1, 1)
    met = kept if optimizer.decay_first else 1  # whether the error is that of the decayed weights
    keep = kept - rates * keys[:, :, None] ** 2 * met
    add = rates * keys[:, :, None] * values[:, None]
    again = None
    if chunk.document is not None:
        again = chunk.document != jnp.concatenate([chunk.document[:1], chunk.document[:-1]])
    kernels = _states(keep, add, carried[0].kernel, start[0].kernel, again)
    out = jnp.einsum("mk,mkv->mv", learner.query_scale * x.queries, kernels)
    return (carried[0]._replace(kernel=kernels[-1]),), out


def _states(keep: Array, add: Array, h: Array, start: Array, again: Array | None) -> Array:
    """`h_t = keep_t h_{t-1} + add_t`, `[m, K, V]`; from `start` where a document starts `again`."""

    def step(h: Array, xs: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        keep, add, again = xs
        h = keep * (h if again is None else jnp.where(again, start, h)) + add
        return h, h

    return jax.lax.scan(step, h, (keep, add, again))[1]
