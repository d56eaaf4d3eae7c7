"""Chunk by chunk by autodiff: any model, loss, transform and link.

Where gradients are taken at an anchor that stays for a chunk, those of all its tokens are one pass of autodiff; where
the anchor moves with every token, tokens follow one another, and the backward pass computes a chunk again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tttlm.ops.ttt.chunks import Chunk, over_chunks, remat_scan
from tttlm.ops.ttt.coefficients import coefficients
from tttlm.ops.ttt.definition import Constants, Flags, Gates, by_head, gradient, of_heads, take_step, token
from tttlm.ops.ttt.description import Learner, Optimizer, Ridge
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, Pending, Window, carries_anchor, read_weights
from tttlm.ops.ttt.models import prediction
from tttlm.ops.ttt.problem import Problem, Shapes, select

FREE_CHUNK = 64  # tokens of a chunk that no clock bounds


class Chunked:
    """Per-chunk gradients by autodiff, as an implementation."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """None, but where the anchor stays while a link is kept or a channel has a gate at every token."""
        optimizer, clocks = learner.optimizer, learner.clocks
        if isinstance(optimizer, Ridge) or clocks.step > 1 or clocks.anchor == 1:
            return None
        if learner.keep_link:
            return "a link that is kept at every token has no form over a chunk"
        if any(gate is not None and gate.per_channel for gate in (optimizer.momentum, optimizer.decay)):
            return "gates per channel at every token need an anchor of 1"
        return None

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """See `tttlm.ops.ttt.learn`."""
        learner = problem.learner
        clocks = learner.clocks
        if isinstance(learner.optimizer, Ridge) or clocks.anchor == 1:
            return _sequential(problem)
        constants = Constants(of_heads(problem.blank), problem.slow, problem.position_scale)
        over_heads = jax.vmap(partial(_chunk, learner), (Constants(0, 0, None), 0, 0, None))  # type: ignore[arg-type]
        over_rows = jax.vmap(over_heads, (None, 0, 0, _ROWS))
        size = clocks.step if clocks.step > 1 else clocks.anchor or clocks.reset or FREE_CHUNK
        return over_chunks(problem, size, lambda carry, x, chunk: over_rows(constants, carry, x, chunk))


# Axes of a `Chunk` by row; whether any row has a late document is one number for all, so that a branch stays one.
_ROWS: Any = Chunk(0, 0, 0, 0, 0, 0, None)  # type: ignore[arg-type]


def _sequential(problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """Token after token, with the state kept before every chunk alone."""
    learner, state, docs = problem.learner, problem.state, problem.docs
    batch, time = problem.inputs.queries.shape[:2]
    offset = (state.offset[:, None] + jnp.arange(time, dtype=jnp.int32)) % learner.clocks.period
    full = lambda fill: jnp.full((batch, time), fill)
    flags = Flags(offset, full(True) if docs is None else docs.real, full(False) if docs is None else docs.start)
    constants = Constants(of_heads(problem.blank), problem.slow, None)
    over_heads = jax.vmap(partial(token, learner), (Constants(0, 0, None), 0, (0, None)))  # type: ignore[arg-type]
    over_rows = jax.vmap(over_heads, (None, 0, (0, 0)))
    one = lambda carry, xs: over_rows(constants, carry, xs)
    by_time = (
        jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), by_head(problem)),
        jax.tree.map(lambda a: a.swapaxes(0, 1), flags),
    )
    carry, out = remat_scan(one, of_heads(state), by_time, min(time, FREE_CHUNK * problem.remat_chunks))
    after = carry._replace(offset=(state.offset + time) % learner.clocks.period, document=state.document)
    return out.transpose(1, 0, 2, 3), after


def _chunk(
    learner: Learner, constants: Constants, carry: LearnerState, x: LearnerInputs, chunk: Chunk
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """One chunk of one head, all of whose gradients are taken at one anchor."""
    clocks, optimizer, blank = learner.clocks, learner.optimizer, constants.blank
    assert isinstance(optimizer, Optimizer)
    size = x.queries.shape[0]
    if chunk.reset is not None:
        carry = select(chunk.reset, blank, carry)
    if clocks.reset is not None:
        carry = select(chunk.begins & (chunk.offset % clocks.reset == 0), blank, carry)
    same, late = jnp.tril(jnp.ones((size, size), bool)), None
    in_last = chunk.real
    if chunk.document is not None:
        same, late = same & (chunk.document[:, None] == chunk.document), chunk.document != chunk.document[0]
        in_last = chunk.real & (chunk.document == chunk.document[-1])

    queries = x.queries * learner.query_scale
    if learner.query_projection is not None:
        queries, seen = _project(learner, queries, x.keys, carry, chunk, same, late, in_last)
        carry = carry._replace(seen=seen)
    pairs, window = _pairs(learner, carry, x, chunk.real, same, in_last)
    carry = carry._replace(window=window)
    of_chunk = _one_step if clocks.step > 1 else _steps
    run = lambda base: of_chunk(learner, constants, base, x, queries, pairs, chunk, in_last, same)
    after, out = run(carry)
    if late is not None:

        def with_late() -> tuple[LearnerState, Array]:
            late_after, late_out = run(blank._replace(window=carry.window, seen=carry.seen))
            return select(late[-1], late_after, after), jnp.where(late[:, None], late_out, out)

        after, out = jax.lax.cond(chunk.any_late, with_late, lambda: (after, out))
    return after, out


class Pairs(NamedTuple):
    """What gradients are taken of: `P` writes, and how much of each every token learns, `[m, P]`.

    `parts` are zero or one but for a window, whose rates they are.
    """

    keys: Float[Array, "P K"]
    error_keys: Float[Array, "P K"]
    values: Float[Array, "P V"]
    rates: Any
    parts: Float[Array, "m P"]


def _one_step(
    learner: Learner,
    constants: Constants,
    base: LearnerState,
    x: LearnerInputs,
    queries: Float[Array, "m K"],
    pairs: Pairs,
    chunk: Chunk,
    in_last: Bool[Array, "m"],
    same: Bool[Array, "m m"],
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """A chunk of tokens that make one step, from `base`: the state after it, of the last document, and outputs."""
    clocks, blank, slow = learner.clocks, constants.blank, constants.slow
    initial = blank.weights
    read = read_weights(learner, base.weights, initial) if learner.link_initial else base.anchor
    anchor = base.anchor
    if anchor is None:
        anchor = read_weights(learner, initial, initial) if clocks.anchor is None else read
    gradients = _summed(learner, anchor, slow, pairs, jnp.where(in_last[:, None], pairs.parts, 0).sum(0))

    assert base.pending is not None
    total = lambda a: None if a is None else jnp.where(in_last.reshape(-1, *(1,) * (a.ndim - 1)), a, 0).sum(0)
    of_chunk = Pending(gradients, total(x.momentum), total(x.decay), in_last.sum())
    pending = jax.tree.map(jnp.add, base.pending, of_chunk)
    mean = lambda a: None if a is None else a / jnp.maximum(pending.num_tokens, 1)
    gates = Gates(mean(pending.momentum), mean(pending.decay), None)
    weights, momentum = take_step(learner, initial, base, pending.gradients, gates)
    stepped = chunk.complete & (pending.num_tokens > 0)
    after = base._replace(
        weights=select(stepped, weights, base.weights),
        momentum=select(stepped, momentum, base.momentum),
        pending=select(chunk.complete, blank.pending, pending),
    )
    out = jax.vmap(learner.model, (None, None, 0))(read, slow, queries)
    new = read_weights(learner, after.weights, initial)
    if clocks.visible == "at_step":
        out = out.at[-1].set(jnp.where(chunk.complete, learner.model(new, slow, queries[-1]), out[-1]))
    return _move_anchor(learner, after, new, chunk, len(queries)), out


def _steps(
    learner: Learner,
    constants: Constants,
    base: LearnerState,
    x: LearnerInputs,
    queries: Float[Array, "m K"],
    pairs: Pairs,
    chunk: Chunk,
    in_last: Bool[Array, "m"],
    same: Bool[Array, "m m"],
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """A chunk of tokens each of which is a step, from `base`, with the weights of every token materialised."""
    clocks, optimizer, blank = learner.clocks, learner.optimizer, constants.blank
    assert isinstance(optimizer, Optimizer)
    initial, size = blank.weights, len(queries)
    anchor = base.anchor
    if anchor is None:
        anchor = base.weights if optimizer.position_scale else read_weights(learner, initial, initial)
    of_pair = lambda k, p, v, r: gradient(learner, anchor, constants.slow, k, p, v, r)
    gradients = mix(pairs.parts, jax.vmap(of_pair)(pairs.keys, pairs.error_keys, pairs.values, pairs.rates))
    last = lambda tree: jax.tree.map(lambda a: a[-1], tree)

    if optimizer.position_scale:
        assert constants.position_scale is not None
        assert base.pending is not None
        sums = jax.tree.map(jnp.add, mix(same, gradients), base.pending.gradients)
        scale = constants.position_scale[(chunk.offset + jnp.arange(size)) % len(constants.position_scale)]
        weights = jax.tree.map(lambda w, g: w - by(scale, g) * g, base.weights, sums)
        read = weights
        after = base._replace(
            weights=select(chunk.complete, last(weights), base.weights),
            pending=select(chunk.complete, blank.pending, base.pending._replace(gradients=last(sums))),
        )
    else:
        gate = lambda one, a: None if one is None else one.activation(a)
        momenta, decay = gate(optimizer.momentum, x.momentum), gate(optimizer.decay, x.decay)
        of = coefficients(momenta, decay, x.step_size, chunk.real, same, queries.dtype)
        steps = gradients
        if of.carried is not None and of.gathered is not None:
            carried, gathered = of.carried, mix(of.gathered, gradients)
            steps = jax.tree.map(lambda s, g: by(carried, g) * s + g, base.momentum, gathered)
            after = base._replace(momentum=last(steps))
        else:
            after = base
        steps = steps if optimizer.transform is None else jax.vmap(optimizer.transform)(steps)
        kept = jnp.ones(size, queries.dtype) if of.kept is None else of.kept
        weights = jax.tree.map(lambda w, p: by(kept, p) * w - p, base.weights, mix(of.lasting, steps))
        after = after._replace(weights=last(weights))
        if clocks.visible == "after_step":
            first = jnp.sum(same, axis=1) == 1  # of its document
            weights = jax.tree.map(lambda w, base: jnp.concatenate([base[None], w[:-1]]), weights, base.weights)
            weights = jax.tree.map(lambda w, base: jnp.where(by(first, w), base, w), weights, base.weights)
        read = weights
        if learner.link is not None:
            read = jax.vmap(lambda w: read_weights(learner, w, initial))(weights)
    out = jax.vmap(learner.model, (0, None, 0))(read, constants.slow, queries)
    return _move_anchor(learner, after, read_weights(learner, after.weights, initial), chunk, size), out


def by(coefficient: Array, like: Array) -> Array:
    """`coefficient` with axes of size one behind its own, to multiply `like`."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def mix(coefficient: Array, tree: Any) -> Any:
    """`Σ_s coefficient_ts a_s` for every leaf."""
    return jax.tree.map(lambda a: jnp.tensordot(coefficient.astype(a.dtype), a, 1), tree)


def _move_anchor(learner: Learner, state: LearnerState, read: Any, chunk: Chunk, size: int) -> LearnerState:
    """The state whose anchor has moved to the weights that are read, where the chunk's end is a time for it."""
    if not carries_anchor(learner):
        return state
    assert learner.clocks.anchor is not None
    moves = chunk.complete & ((chunk.offset + size) % learner.clocks.anchor == 0)
    return state._replace(anchor=select(moves, read, state.anchor))


def _summed(learner: Learner, weights: Any, slow: Any, pairs: Pairs, parts: Float[Array, "P"]) -> Any:
    """The gradients of all pairs times their rates and `parts`, summed."""
    optimizer = learner.optimizer
    assert isinstance(optimizer, Optimizer)
    predict = jax.vmap(prediction(learner.model), (None, None, 0))
    errors = jax.vmap(jax.grad(learner.loss))(predict(weights, slow, pairs.error_keys), pairs.values)
    errors = by(parts, errors) * errors
    if optimizer.rate in ("token", "value"):
        errors = jax.vmap(jnp.multiply)(pairs.rates, errors)
    _, pull = jax.vjp(lambda w: predict(w, slow, pairs.keys), weights)
    if optimizer.rate != "matrix":
        return pull(errors)[0]
    leaves, structure = jax.tree.flatten(pairs.rates)
    of_leaf = [jax.tree.leaves(pull(by(rate, errors) * errors)[0])[i] for i, rate in enumerate(leaves)]
    return jax.tree.unflatten(structure, of_leaf)


def _pairs(
    learner: Learner,
    carry: LearnerState,
    x: LearnerInputs,
    real: Bool[Array, "m"],
    same: Bool[Array, "m m"],
    in_last: Bool[Array, "m"],
) -> tuple[Pairs, Window | None]:
    """The pairs that a chunk learns from, and the window after it."""
    size, writes = x.keys.shape[:2]
    dtype = x.queries.dtype
    flat = lambda tree: jax.tree.map(lambda a: a.reshape(size * writes, *a.shape[2:]), tree)
    keys, values = flat(x.keys), flat(x.values)
    if carry.window is None:
        own = jnp.repeat(jnp.diag(real).astype(dtype), writes, axis=1)
        error_keys = keys if x.error_keys is None else flat(x.error_keys)
        return Pairs(keys, error_keys, values, flat(x.rates), own), None

    before = learner.window - 1
    valid = jnp.concatenate([carry.window.valid, real])
    keys = jnp.concatenate([carry.window.keys, keys])
    values = jnp.concatenate([carry.window.values, values])
    # Pairs are told by how many real tokens lie between; those of the window belong to the first slot's document.
    rank = jnp.concatenate([jnp.arange(1 - before, 1), jnp.cumsum(real)])
    ago = rank[before:, None] - rank  # [m, P]
    seen = jnp.concatenate([jnp.repeat(same[:, :1], before, axis=1), same], axis=1)
    seen = seen & valid & real[:, None] & (ago >= 0) & (ago < learner.window)
    rates = x.rates[:, 0]  # [m, window]
    parts = jnp.where(seen, jnp.take_along_axis(rates, jnp.clip(ago, 0, before), axis=1), 0)
    pairs = Pairs(keys, keys, values, jnp.ones(len(keys), dtype), parts)

    of_last = jnp.concatenate([jnp.repeat(same[-1, 0], before), in_last]) & valid
    order = jnp.cumsum(of_last)
    wanted = order[-1] - jnp.arange(before - 1, -1, -1)
    at = jnp.searchsorted(order, wanted)
    there = wanted >= 1
    kept = [jnp.where(there[:, None], a[at], 0) for a in (keys, values)]
    return pairs, Window(kept[0], kept[1], there)


def _project(
    learner: Learner,
    queries: Float[Array, "m K"],
    keys: Float[Array, "m n K"],
    carry: LearnerState,
    chunk: Chunk,
    same: Bool[Array, "m m"],
    late: Bool[Array, "m"] | None,
    in_last: Bool[Array, "m"],
) -> tuple[Float[Array, "m K"], Float[Array, "K K"]]:
    """Queries times `Σ kᵀk / |k|²`, and that sum after the chunk."""
    clock = learner.clocks.anchor if learner.query_projection == "anchor" else learner.clocks.reset
    assert clock is not None
    assert carry.seen is not None
    seen = jnp.where(chunk.begins & (chunk.offset % clock == 0), 0, carry.seen)
    squares = jnp.sum(keys * keys, -1, keepdims=True)
    unit = jnp.where(squares > 0, keys / jnp.where(squares > 0, squares, 1), 0)
    unit = jnp.where(chunk.real[:, None, None], unit, 0)
    scores = jnp.where(same[:, :, None], jnp.einsum("tk,snk->tsn", queries, unit), 0)
    of_carried = queries @ seen
    if late is not None:
        of_carried = jnp.where(late[:, None], 0, of_carried)
        seen = jnp.where(late[-1], 0, seen)
    after = seen + jnp.einsum("snk,snl->kl", jnp.where(in_last[:, None, None], unit, 0), keys)
    return of_carried + jnp.einsum("tsn,snk->tk", scores, keys), after
