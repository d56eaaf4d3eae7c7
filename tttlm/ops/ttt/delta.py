"""Linear models whose anchor moves with every token: the WY form, over chunks of any length.

With `Λ_ts` the product of the gates after `s` up to `t`, the weights are the decayed weights from the start of the
chunk plus the decayed writes since, `W_t = Λ_t W + Σ_{s<=t} (Λ_ts k_s)ᵀ u_s`. A write is `u_t = rate_t (v_t - p_t W̃)`
with `p` the error key (the key, except in Comba) and `W̃` the weights before the write, after or before their decay, so
that all writes of a chunk solve one triangular system

    (I + rate o tril(p̃ k̃ᵀ, -1)) u = rate (v - p̃ W)

which is diagonal if the loss is linear in the prediction (linear attention and its gated variants). Rates per value
channel give one system for each channel (Longhorn). A token with several writes reads after the last.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tttlm.ops.ttt.chunks import Chunk, over_chunks
from tttlm.ops.ttt.coefficients import from_start, range_products
from tttlm.ops.ttt.description import Learner, Optimizer, Ridge
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState
from tttlm.ops.ttt.losses import dot, half_square, square
from tttlm.ops.ttt.problem import Problem, Shapes, select
from tttlm.ops.ttt.systems import inverse_of_unit_lower, substitute

CHUNK = 64  # tokens
CHANNEL_CHUNK = 16  # gates per channel make a tensor of [chunk, chunk, K]; rates per channel substitute token by token
SLOPES: dict[Any, float] = {half_square: 1.0, square: 2.0}  # of the error, as it enters the gradient


class Delta:
    """The WY form, as an implementation."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """One line for all but linear models without bias that step at every token from its own weights."""
        optimizer = learner.optimizer
        if isinstance(optimizer, Ridge) or not learner.linear:
            return "the WY form needs a linear model without bias, and steps"
        if learner.clocks.anchor != 1 or learner.clocks.step != 1 or learner.clocks.reset or learner.query_projection:
            return "the WY form needs the gradient at every token's own weights, and no resets or query projection"
        if learner.loss is not dot and learner.loss not in SLOPES:
            return "the WY form needs a loss of half_square, square or dot"
        shaped = (
            optimizer.momentum or optimizer.transform or optimizer.step_size or optimizer.position_scale or learner.link
        )
        if shaped or learner.window > 1 or optimizer.rate == "matrix":
            return "the WY form has no momentum, transform, step size, position scale, link, window or rates per matrix"
        if learner.clocks.visible != "at_step":
            return "the WY form reads after a token's own write"
        return None

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """See `tttlm.ops.ttt.learn`."""
        learner = problem.learner
        assert isinstance(learner.optimizer, Optimizer)
        decay, rate = learner.optimizer.decay, learner.optimizer.rate
        size = CHANNEL_CHUNK if rate == "value" or (decay is not None and decay.per_channel) else CHUNK
        size = max(size // learner.clocks.writes_per_token, 1)
        over_heads = jax.vmap(partial(_chunk, learner), (0, 0, 0, None))
        over_rows = jax.vmap(over_heads, (None, 0, 0, Chunk(0, 0, 0, 0, 0, 0, None)))  # type: ignore[arg-type]
        initial = problem.blank.weights[0].kernel

        def step(carry: LearnerState, x: LearnerInputs, chunk: Chunk) -> tuple[LearnerState, Array]:
            kernel, out = over_rows(initial, carry.weights[0].kernel, x, chunk)
            return carry._replace(weights=(carry.weights[0]._replace(kernel=kernel),)), out

        return over_chunks(problem, size, step, clocked=False)


def _chunk(
    learner: Learner, initial: Float[Array, "K V"], kernel: Float[Array, "K V"], x: LearnerInputs, chunk: Chunk
) -> tuple[Float[Array, "K V"], Float[Array, "m V"]]:
    """One chunk of one head."""
    optimizer = learner.optimizer
    assert isinstance(optimizer, Optimizer)
    size, writes = x.keys.shape[:2]
    flat = lambda a: a.reshape(size * writes, *a.shape[2:])
    keys, values = flat(x.keys), flat(x.values)
    error_keys = keys if x.error_keys is None else flat(x.error_keys)
    rates = jnp.ones(size * writes, keys.dtype) if x.rates is None else flat(x.rates)
    if optimizer.implicit:
        squares = jnp.sum(keys * keys, -1).reshape(-1, *(1,) * (rates.ndim - 1))
        rates = rates / (1 + rates * squares)
    real = jnp.repeat(chunk.real, writes)
    if chunk.reset is not None:
        kernel = select(chunk.reset, initial, kernel)
    same = jnp.tril(jnp.ones((size * writes,) * 2, bool))
    in_new_document = None
    if chunk.document is not None:
        documents = jnp.repeat(chunk.document, writes)
        same, in_new_document = same & (documents[:, None] == documents), documents != documents[0]
    gates = None
    if optimizer.decay is not None:
        gates = optimizer.decay.activation(x.decay)
        gates = jnp.where(chunk.real.reshape(-1, *(1,) * (gates.ndim - 1)), gates, 1)
        if writes > 1:  # decayed once, before a token's first write
            gates = jnp.concatenate([gates[:, None], jnp.ones((size, writes - 1, *gates.shape[1:]), gates.dtype)], 1)
            gates = gates.reshape(size * writes, *gates.shape[2:])
    products = _Products(gates, same)
    slope = 0.0 if learner.loss is dot else SLOPES[learner.loss]
    targets = jnp.where(real[:, None], values if learner.loss is dot else slope * values, 0)
    rates = jnp.where(real.reshape(-1, *(1,) * (rates.ndim - 1)), rates, 0)
    queries = learner.query_scale * x.queries
    read = jnp.arange(writes - 1, size * writes, writes)  # a token's last write

    def from_base(base: Float[Array, "K V"]) -> tuple[Array, Array]:
        right = targets
        system = None
        if slope:
            system = slope * products.between(error_keys, keys, decayed=optimizer.decay_first)
            right = targets - slope * products.since_start(error_keys, decayed=optimizer.decay_first) @ base
        u = _solve(rates, right, system)
        scores = products.between(queries, keys, decayed=True, rows=read, own=True)
        out = products.since_start(queries, decayed=True, rows=read) @ base + scores @ u
        return products.last(keys, u, base), out

    after, out = from_base(kernel)
    if in_new_document is not None:

        def with_new_documents() -> tuple[Array, Array]:
            new_after, new_out = from_base(initial)
            return select(in_new_document[-1], new_after, after), jnp.where(
                in_new_document[read][:, None], new_out, out
            )

        after, out = jax.lax.cond(chunk.starts_mid_chunk, with_new_documents, lambda: (after, out))
    return after, out


class _Products:
    """Products of vectors with the decay between them: `gates` are None, `[m]` for all channels, or `[m, K]`."""

    def __init__(self, gates: Float[Array, "m *K"] | None, same: Bool[Array, "m m"]):
        self.gates, self.same = gates, same
        self.ranges = self.starts = None
        if gates is not None:
            gates = gates if gates.ndim == 1 else gates.T
            self.ranges, self.starts = range_products(gates, same), from_start(gates, same)  # [(K), m, m], [(K), m]

    def between(self, left, right, *, decayed: bool, rows: Any = slice(None), own: bool = False) -> Float[Array, "r m"]:
        """`left_t Λ_ts right_s` for `s < t`, and `s = t` with `own`; not `decayed`: up to before the gate of `t`."""
        mask = self.same if own else self.same & ~jnp.eye(len(self.same), dtype=bool)
        if self.ranges is None:
            return jnp.where(mask[rows], left @ right.T, 0)
        ranges = self.ranges if decayed else self._before(self.ranges)
        if ranges.ndim == 2:
            return jnp.where(mask[rows], ranges[rows] * (left @ right.T), 0)
        return jnp.where(mask[rows], jnp.einsum("tk,kts,sk->ts", left, ranges[:, rows], right), 0)

    def since_start(self, left, *, decayed: bool, rows: Any = slice(None)) -> Float[Array, "r K"]:
        """`left_t` times the decay of the initial weights, up to before the gate of `t` if not `decayed`."""
        if self.starts is None:
            return left
        starts = self.starts if decayed else self._before(self.starts[..., None])[..., 0]
        return left * (starts[rows, None] if starts.ndim == 1 else starts.T[rows])

    def last(self, keys, u, base) -> Float[Array, "K V"]:
        """The weights after the last token, of its document."""
        if self.ranges is None or self.starts is None:
            return base + jnp.where(self.same[-1][:, None], keys, 0).T @ u
        if self.ranges.ndim == 2:
            return self.starts[-1] * base + (self.ranges[-1][:, None] * keys).T @ u
        return self.starts[:, -1:] * base + (self.ranges[:, -1] * keys.T) @ u

    def _before(self, a: Float[Array, "*K m c"]) -> Float[Array, "*K m c"]:
        """Row `t` is that of `t - 1`, where both are of one document, else that of the start: one."""
        shifted = jnp.concatenate([jnp.ones_like(a[..., :1, :]), a[..., :-1, :]], axis=-2)
        follows = jnp.concatenate([jnp.zeros(1, bool), jnp.diagonal(self.same, -1)])
        return jnp.where(follows[:, None], shifted, 1)


def _solve(
    rates: Float[Array, "m *V"], right: Float[Array, "m V"], system: Float[Array, "m m"] | None
) -> Float[Array, "m V"]:
    """`u` with `u + rates o (system u) = rates o right`, `system` strictly lower triangular."""
    if system is None:
        return rates.reshape(len(rates), -1) * right
    if rates.ndim == 2:
        return substitute(rates, right, system)
    return inverse_of_unit_lower(rates[:, None] * system) @ (rates[:, None] * right)
