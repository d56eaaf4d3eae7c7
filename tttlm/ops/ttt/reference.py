"""The definition: token after token, the gradient by autodiff, and the weights of that token, materialised.

Everything here is for one head of one sequence, and mapped over both. It is not optimised; every faster implementation
is tested against it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tttlm.ops.ttt.description import Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, Pending, Window, carries_anchor, read_weights
from tttlm.ops.ttt.models import prediction
from tttlm.ops.ttt.problem import Problem, Shapes, select
from tttlm.ops.ttt.systems import solve_positive


class Constants(NamedTuple):
    """Values that are equal for all tokens: the state that a document starts from, and slow parameters."""

    blank: LearnerState
    slow: Any
    position_scale: Float[Array, "M"] | None


class Flags(NamedTuple):
    """Flags of a token: its offset in the period of the clocks, whether it is not padding, whether a document starts
    with it, and whether it counts as a position."""

    offset: Int[Array, "*T"]
    real: Bool[Array, "*T"]
    start: Bool[Array, "*T"]
    counts: Bool[Array, "*T"]


class Reference:
    """The definition as an implementation; it supports everything."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """None: the definition has no limits."""
        return None

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """See `tttlm.ops.ttt.learn`."""
        learner, state = problem.learner, problem.state
        flags = flags_of(problem)
        constants = Constants(of_heads(problem.blank), problem.slow, problem.position_scale)

        in_axes: Any = Constants(blank=0, slow=0, position_scale=None)  # type: ignore[arg-type]

        def row(constants, carried, inputs, flags):
            head = lambda c, s, x: jax.lax.scan(partial(token, learner, c), s, (x, flags))
            return jax.vmap(head, (in_axes, 0, 0))(constants, carried, inputs)

        carried, outputs = jax.vmap(row, (None, 0, 0, 0))(constants, of_heads(state), by_head(problem), flags)
        return outputs.swapaxes(1, 2), carried._replace(offset=problem.next_offset, document=state.document)


def flags_of(problem: Problem) -> Flags:
    """The flags of every token, `[B, T]`."""
    state, docs = problem.state, problem.docs
    batch, time = problem.inputs.queries.shape[:2]
    steps = jnp.arange(time, dtype=jnp.int32)
    full = lambda fill: jnp.full((batch, time), fill)
    return Flags(
        offset=(state.offset[:, None] + steps) % problem.learner.clocks.period,
        real=full(True) if docs is None else docs.real,
        start=full(False) if docs is None else docs.start,
        counts=steps < jnp.broadcast_to(problem.positions, (batch,))[:, None],
    )


def of_heads(state: LearnerState) -> LearnerState:
    """The parts of a state that belong to a head; offset and document belong to a sequence."""
    return state._replace(offset=None, document=None)  # type: ignore[arg-type]


def by_head(problem: Problem) -> LearnerInputs:
    """The inputs with heads before tokens, `[B, H, T, ...]`, and an axis after it for the writes of a token."""
    time, writes = problem.inputs.queries.shape[1], problem.learner.clocks.writes_per_token

    def split(a):
        a = a.swapaxes(1, 2)
        return a.reshape(*a.shape[:2], time, writes, *a.shape[3:])

    inputs = problem.computed(problem.inputs)
    written = {name: jax.tree.map(split, getattr(inputs, name)) for name in ("keys", "values", "rates", "error_keys")}
    others = {name: getattr(inputs, name) for name in inputs._fields if name not in written}
    return LearnerInputs(**written, **jax.tree.map(lambda a: a.swapaxes(1, 2), others))


def token(
    learner: Learner, constants: Constants, state: LearnerState, xs: tuple[LearnerInputs, Flags]
) -> tuple[LearnerState, Float[Array, "V"]]:
    """One token of one head: the state after it, and its output."""
    after, out = _token(learner, constants, state, xs)
    return select(xs[1].counts, after, state), out


def _token(
    learner: Learner, constants: Constants, state: LearnerState, xs: tuple[LearnerInputs, Flags]
) -> tuple[LearnerState, Float[Array, "V"]]:
    clocks, blank = learner.clocks, constants.blank
    x, flags = xs
    again = flags.start
    if clocks.reset is not None:
        again |= flags.offset % clocks.reset == 0
    state = select(again, blank, state)
    if isinstance(learner.optimizer, Ridge):
        return _ridge(learner, learner.optimizer, constants, state, x, flags.real)

    optimizer = learner.optimizer
    query, state = _query(learner, state, x, flags)
    state, window = _pairs(learner, state, x, flags.real)
    initial = blank.weights
    before = read_weights(learner, state.weights, initial) if learner.link_initial else state.anchor
    # With an anchor of 1 every write is a step of its own; else the gradients of a token's writes are summed.
    each = clocks.anchor == 1
    for i in range(clocks.writes_per_token if each else 1):
        gates = Gates(x.momentum, x.decay, x.step_size) if i == 0 else Gates(None, None, None)
        at = state.weights
        if optimizer.decay_first and i == 0:
            at = _decay(optimizer.decay, gates.decay, at)
            state = state._replace(weights=select(flags.real, at, state.weights))
        anchor = state.anchor
        if anchor is None:
            anchor = read_weights(learner, initial if clocks.anchor is None else at, initial)
        writes = [i] if each else range(clocks.writes_per_token)
        gradients = _sum(_gradient_of(learner, constants, anchor, x, j, window) for j in writes)
        state = _advance(learner, optimizer, constants, state, gradients, gates, flags)

    if optimizer.position_scale:
        assert constants.position_scale is not None
        assert clocks.anchor is not None
        assert state.pending is not None
        position = flags.offset % clocks.anchor
        scale = constants.position_scale[position]
        read = jax.tree.map(lambda w, g: w - scale * g, state.weights, state.pending.gradients)
        full = position == clocks.anchor - 1
        state = state._replace(
            weights=select(full, read, state.weights), pending=select(full, blank.pending, state.pending)
        )
    else:
        read = read_weights(learner, state.weights, initial)
        if carries_anchor(learner):
            assert clocks.anchor is not None
            moves = (flags.offset + 1) % clocks.anchor == 0
            state = state._replace(anchor=select(moves, read, state.anchor))
        if clocks.visible == "after_step":
            read = before
    return state, learner.model(read, constants.slow, query)


class Gates(NamedTuple):
    """The inputs of a token for the step: `[]` or `[K]`, or None."""

    momentum: Array | None
    decay: Array | None
    step_size: Array | None


def _advance(
    learner: Learner,
    optimizer: Optimizer,
    constants: Constants,
    state: LearnerState,
    gradients: Any,
    gates: Gates,
    flags: Flags,
) -> LearnerState:
    """Adds a token's gradients to the step in progress, and takes the step when it is complete."""
    if optimizer.position_scale:
        assert state.pending is not None
        added = jax.tree.map(jnp.add, state.pending.gradients, gradients)
        return state._replace(pending=state.pending._replace(gradients=select(flags.real, added, state.pending[0])))
    if state.pending is None:  # every token is a step
        weights, momentum = take_step(learner, constants.blank.weights, state, gradients, gates)
        return state._replace(
            weights=select(flags.real, weights, state.weights), momentum=select(flags.real, momentum, state.momentum)
        )
    of_token = Pending(gradients, gates.momentum, gates.decay, 1.0)
    pending = select(flags.real, jax.tree.map(jnp.add, state.pending, of_token), state.pending)
    mean = lambda total: None if total is None else total / jnp.maximum(pending.num_tokens, 1)
    weights, momentum = take_step(
        learner,
        constants.blank.weights,
        state,
        pending.gradients,
        Gates(mean(pending.momentum), mean(pending.decay), None),
    )
    complete = (flags.offset + 1) % learner.clocks.step == 0
    stepped = complete & (pending.num_tokens > 0)
    return state._replace(
        weights=select(stepped, weights, state.weights),
        momentum=select(stepped, momentum, state.momentum),
        pending=select(complete, constants.blank.pending, pending),
    )


def take_step(learner: Learner, initial: Any, state: LearnerState, gradients: Any, gates: Gates) -> tuple[Any, Any]:
    """The weights and the momentum after one step; weights that decay before the gradient come in decayed."""
    optimizer = learner.optimizer
    assert isinstance(optimizer, Optimizer)
    step, momentum = gradients, state.momentum
    if optimizer.momentum is not None:
        step = momentum = jax.tree.map(jnp.add, _decay(optimizer.momentum, gates.momentum, momentum), gradients)
    step = step if optimizer.transform is None else optimizer.transform(step)
    if gates.step_size is not None:
        step = jax.tree.map(lambda s: gates.step_size * s, step)
    weights = state.weights
    if gates.decay is not None and not optimizer.decay_first:
        weights = _decay(optimizer.decay, gates.decay, weights)
    weights = jax.tree.map(jnp.subtract, weights, step)
    if learner.keep_link:
        assert learner.link is not None
        weights = learner.link(weights, initial)
    return weights, momentum


def gradient(
    learner: Learner,
    weights: Any,
    slow: Any,
    key: Float[Array, "K"],
    error_key: Float[Array, "K"],
    target: Float[Array, "V"],
    rate: Any,
) -> Any:
    """The gradient of one pair's loss in `weights` times its rate: its error at `error_key`, written along `key`."""
    optimizer, predict = learner.optimizer, prediction(learner.model)
    assert isinstance(optimizer, Optimizer)
    error = jax.grad(learner.loss)(predict(weights, slow, error_key), target)
    if optimizer.implicit:
        rate = rate / (1 + rate * jnp.sum(key * key))
    if optimizer.rate in ("token", "value"):
        error = rate * error
    _, pull = jax.vjp(lambda w: predict(w, slow, key), weights)
    (result,) = pull(error)
    return jax.tree.map(jnp.multiply, rate, result) if optimizer.rate == "matrix" else result


def _gradient_of(learner, constants, anchor, x: LearnerInputs, write: int, window: Window | None) -> Any:
    """The gradient of a token's write, or of all pairs in its window."""
    rate = jax.tree.map(lambda r: r[write], x.rates)
    if window is None:
        key = x.keys[write]
        error_key = key if x.error_keys is None else x.error_keys[write]
        return gradient(learner, anchor, constants.slow, key, error_key, x.values[write], rate)
    of_pair = lambda k, v, r: gradient(learner, anchor, constants.slow, k, k, v, r)
    gradients = jax.vmap(of_pair)(window.keys, window.values, jnp.where(window.valid, rate[::-1], 0))
    return jax.tree.map(lambda g: jnp.sum(g, 0), gradients)


def _pairs(
    learner: Learner, state: LearnerState, x: LearnerInputs, real: Bool[Array, ""]
) -> tuple[LearnerState, Window | None]:
    """The pairs that a token learns from, the newest last; and the state that remembers them."""
    if state.window is None:
        return state, None
    now = Window(x.keys, x.values, jnp.ones((1,), bool))
    window = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), state.window, now)
    kept = jax.tree.map(lambda a: a[1:], window)
    return state._replace(window=select(real, kept, state.window)), window


def _query(
    learner: Learner, state: LearnerState, x: LearnerInputs, flags: Flags
) -> tuple[Float[Array, "K"], LearnerState]:
    """The query as the model reads it, and the state with what is seen of the keys."""
    query = x.queries * learner.query_scale
    if learner.query_projection is None:
        return query, state
    clock = learner.clocks.anchor if learner.query_projection == "anchor" else learner.clocks.reset
    assert clock is not None
    assert state.seen is not None
    squares = jnp.sum(x.keys * x.keys, -1, keepdims=True)
    unit = jnp.where(squares > 0, x.keys / jnp.where(squares > 0, squares, 1), 0)
    seen = select(flags.offset % clock == 0, jnp.zeros_like(state.seen), state.seen)
    seen = seen + jnp.where(flags.real, unit.T @ x.keys, 0)
    return query @ seen, state._replace(seen=seen)


def _ridge(
    learner: Learner,
    optimizer: Ridge,
    constants: Constants,
    state: LearnerState,
    x: LearnerInputs,
    real: Bool[Array, ""],
) -> tuple[LearnerState, Float[Array, "V"]]:
    """One token of the exact solve."""
    key, value, rate = x.keys[0], x.values[0], x.rates[0]
    sums = state.weights if optimizer.decay is None else _decay(optimizer.decay, x.decay, state.weights)
    sums = sums._replace(kk=sums.kk + rate * jnp.outer(key, key), kv=sums.kv + rate * jnp.outer(key, value))
    state = state._replace(weights=select(real, sums, state.weights))
    weights = solve_positive(state.weights.kk + jnp.diag(constants.slow), state.weights.kv)
    return state, learner.query_scale * x.queries @ weights


def _decay(gate: Gate | None, x: Array | None, tree: Any) -> Any:
    """Every leaf times the gate; per channel, every row of a kernel by its own."""
    assert gate is not None
    by = gate.activation(x)
    return jax.tree.map(lambda a: (by[:, None] if gate.per_channel else by) * a, tree)


def _sum(trees) -> Any:
    first, *others = trees
    for other in others:
        first = jax.tree.map(jnp.add, first, other)
    return first
