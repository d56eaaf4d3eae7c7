"""Chunk by chunk by autodiff: any model, loss, transform and link.

Where gradients are taken at an anchor that stays for a chunk, those of all its tokens are one pass of autodiff; where
the anchor moves with every token, tokens follow one another, and the backward pass computes a chunk again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.ops.ttt.anchored import FREE_CHUNK, Pairs, Tokens, anchored, by, mix, move_anchor
from tttlm.ops.ttt.chunks import Chunk, remat_scan
from tttlm.ops.ttt.coefficients import coefficients
from tttlm.ops.ttt.description import Learner, Optimizer, Ridge
from tttlm.ops.ttt.learner_state import LearnerState, Pending, read_weights
from tttlm.ops.ttt.models import prediction
from tttlm.ops.ttt.problem import Problem, Shapes, select
from tttlm.ops.ttt.reference import Constants, Gates, by_head, flags_of, gradient, of_heads, take_step, token


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
        return anchored(problem, _one_step if clocks.step > 1 else _steps)


def _sequential(problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """Token after token, with the state kept before every chunk alone."""
    learner, state = problem.learner, problem.state
    constants = Constants(of_heads(problem.blank), problem.slow, None)
    over_heads = jax.vmap(partial(token, learner), (Constants(0, 0, None), 0, (0, None)))  # type: ignore[arg-type]
    over_rows = jax.vmap(over_heads, (None, 0, (0, 0)))
    one = lambda carry, xs: over_rows(constants, carry, xs)
    by_time = (
        jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), by_head(problem)),
        jax.tree.map(lambda a: a.swapaxes(0, 1), flags_of(problem)),
    )
    carry, out = remat_scan(
        one, of_heads(state), by_time, min(problem.inputs.queries.shape[1], FREE_CHUNK * problem.remat_chunks)
    )
    return out.transpose(1, 0, 2, 3), carry._replace(offset=problem.next_offset, document=state.document)


def _one_step(
    learner: Learner,
    constants: Constants,
    base: LearnerState,
    tokens: Tokens,
    chunk: Chunk,
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """A chunk of tokens that make one step, from `base`: the state after it, of the last document, and outputs."""
    x, queries, pairs, in_last, _ = tokens
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
    return move_anchor(learner, after, new, chunk, len(queries)), out


def _steps(
    learner: Learner,
    constants: Constants,
    base: LearnerState,
    tokens: Tokens,
    chunk: Chunk,
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """A chunk of tokens each of which is a step, from `base`, with the weights of every token materialised."""
    x, queries, pairs, _, same = tokens
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
    return move_anchor(learner, after, read_weights(learner, after.weights, initial), chunk, size), out


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
