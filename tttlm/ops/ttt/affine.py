"""The dual form of an inner MLP whose updates are affine in gradients at an anchor, without weights of single tokens.

With `x_l`, `z_l` the inputs and pre-activations of layer `l` for the keys at the anchor, `G_l = dloss/dz_l` times the
rates, and bars for the queries, the weights of token `t` are `kept_t U + carried_t S - Σ_s mix_ts g_s` (see
`tttlm.ops.ttt.coefficients`), so that

    zbar_l = kept (xbar_l U_l + b_l) + carried (xbar_l S_l + s_l) - (mix o (xbar_l x_lᵀ + 1)) G_l

(the `+ 1` is the bias, one more input that is always 1).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.ops.ttt.anchored import Tokens, anchored, move_anchor
from tttlm.ops.ttt.chunks import Chunk
from tttlm.ops.ttt.coefficients import coefficients
from tttlm.ops.ttt.description import Learner, Optimizer, Ridge
from tttlm.ops.ttt.dual import dual
from tttlm.ops.ttt.learner_state import LearnerState, Pending
from tttlm.ops.ttt.losses import half_square
from tttlm.ops.ttt.model import activation as gelu_tanh
from tttlm.ops.ttt.models import MLP, Normed, Residual
from tttlm.ops.ttt.problem import Problem, Shapes, select
from tttlm.ops.ttt.reference import Constants
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState


class Dual:
    """The dual form, as an implementation."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """One line for all but MLPs whose steps of one token are affine in gradients at an anchor that stays."""
        optimizer, clocks = learner.optimizer, learner.clocks
        if isinstance(optimizer, Ridge) or _parts(learner.model) is None:
            return "the dual form needs an MLP, perhaps with a slow norm and a residual, and steps"
        moving = clocks.anchor == 1 and not optimizer.position_scale
        if moving or clocks.step > 1 or clocks.writes_per_token > 1 or clocks.visible != "at_step":
            return "the dual form needs steps of one token and one write, read at once, from an anchor that stays"
        if optimizer.transform or learner.link or learner.error_keys or optimizer.rate not in (None, "token"):
            return "the dual form has no transform, link, error keys, or rates but one for each token"
        if any(gate is not None and gate.per_channel for gate in (optimizer.momentum, optimizer.decay)):
            return "the dual form has no gates per channel"
        return None

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """See `tttlm.ops.ttt.learn`."""
        return _paper(problem) if _is_paper(problem.learner) else anchored(problem, _steps)


class _Parts(NamedTuple):
    """An MLP with its norm and residual."""

    mlp: MLP
    norm: Normed | None
    residual: bool


def _parts(model: Any) -> _Parts | None:
    residual = isinstance(model, Residual)
    model = model.inner if isinstance(model, Residual) else model
    norm = model if isinstance(model, Normed) else None
    mlp = norm.inner if norm is not None else model
    return _Parts(mlp, norm, residual) if isinstance(mlp, MLP) and not (norm and norm.fast_scale) else None


def _is_paper(learner: Learner) -> bool:
    """Whether it is the learner of TTT-Linear and TTT-MLP, which `tttlm.ops.ttt.dual` is written for."""
    parts, optimizer, clocks = _parts(learner.model), learner.optimizer, learner.clocks
    assert parts is not None
    assert isinstance(optimizer, Optimizer)
    known = parts.mlp.activation is gelu_tanh and learner.loss is half_square and optimizer.rate == "token"
    plain = learner.query_scale == 1 and learner.query_projection is None and learner.window == 1
    paired = parts.residual == (parts.norm is not None)
    return optimizer.position_scale and clocks.reset is None and known and plain and paired


def _paper(problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """TTT-Linear and TTT-MLP."""
    parts, state = _parts(problem.learner.model), problem.state
    assert parts is not None
    assert state.pending is not None
    assert problem.position_scale is not None
    slow = problem.slow
    if parts.norm is not None and slow is None:
        ones = jnp.ones_like(problem.weights[-1].kernel[:, 0])
        slow = InnerNorm(ones, jnp.zeros_like(ones))
    inputs = problem.inputs
    outputs, after = dual(
        inputs.queries,
        inputs.keys,
        inputs.values,
        inputs.rates,
        problem.position_scale,
        problem.weights,
        slow if parts.norm is not None else None,
        state=InnerState(state.weights, state.pending.gradients, state.offset, state.document),
        docs=problem.docs,
        eps=parts.norm.eps if parts.norm is not None else 0.0,
        at_start=problem.at_start,
        aligned=problem.aligned,
        remat_mini_batches=problem.remat_chunks,
    )
    pending = Pending(after.gradients, None, None, None)
    return outputs, state._replace(weights=after.weights, pending=pending, offset=after.offset)


def _steps(
    learner: Learner, constants: Constants, base: LearnerState, tokens: Tokens, chunk: Chunk
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """A chunk of one head from `base`: the state after it, of the last document, and outputs."""
    optimizer, parts = learner.optimizer, _parts(learner.model)
    assert isinstance(optimizer, Optimizer)
    assert parts is not None
    queries, pairs = tokens.queries, tokens.pairs
    anchor = base.anchor
    if anchor is None:
        anchor = base.weights if optimizer.position_scale else constants.blank.weights

    # At the anchor: forward over the keys, and down again with the gradients of the loss.
    inputs, pre_activations = [pairs.keys], [_linear(pairs.keys, anchor[0])]
    for layer in anchor[1:]:
        inputs.append(parts.mlp.activation(pre_activations[-1]))
        pre_activations.append(_linear(inputs[-1], layer))
    read_out = partial(_read_out, parts, constants.slow)
    loss = lambda z, key, value: learner.loss(read_out(key, z), value)
    g = jax.vmap(jax.grad(loss))(pre_activations[-1], pairs.keys, pairs.values)
    gradients = [g if pairs.rates is None else pairs.rates[:, None] * g]
    for layer, z in zip(reversed(anchor[1:]), reversed(pre_activations[:-1]), strict=True):
        _, pull = jax.vjp(parts.mlp.activation, z)
        gradients.extend(pull(gradients[-1] @ layer.kernel.T))
    gradients.reverse()

    after, affine = _affine(learner, constants, base, tokens, chunk)
    xbar = zbar = queries
    for i, (layer, g) in enumerate(zip(base.weights, gradients, strict=True)):
        xbar = parts.mlp.activation(zbar) if i else xbar
        zbar = _linear(xbar, layer)
        zbar = zbar if affine.kept is None else affine.kept[:, None] * zbar
        if affine.carried is not None:
            zbar = zbar + affine.carried[:, None] * _linear(xbar, affine.momentum[i])
        zbar = zbar - (affine.mix * (xbar @ inputs[i].T + (0 if layer.bias is None else 1))) @ g
    out = jax.vmap(read_out)(queries, zbar)

    def summed(parts_of: Float[Array, "P"]) -> tuple[InnerLayer, ...]:
        """`Σ_s parts_s g_s` as weights."""
        weighted = [parts_of[:, None] * g for g in gradients]
        biases = [None if layer.bias is None else jnp.sum(g, 0) for layer, g in zip(anchor, weighted, strict=True)]
        return tuple(InnerLayer(a.T @ g, b) for a, g, b in zip(inputs, weighted, biases, strict=True))

    return after(summed), out


class _Affine(NamedTuple):
    """`U_t = kept_t U + carried_t momentum - Σ_s mix_ts g_s`; None means 1 for `kept` and 0 for `carried`."""

    kept: Float[Array, "m"] | None
    carried: Float[Array, "m"] | None
    momentum: Any
    mix: Float[Array, "m P"]


def _affine(
    learner: Learner, constants: Constants, base: LearnerState, tokens: Tokens, chunk: Chunk
) -> tuple[Callable, _Affine]:
    """The coefficients of a chunk, and a function from what sums gradients to the state after it."""
    optimizer, (x, _, pairs, _, same) = learner.optimizer, tokens
    assert isinstance(optimizer, Optimizer)
    size = len(same)
    if optimizer.position_scale:
        assert constants.position_scale is not None
        assert base.pending is not None
        pending = base.pending
        scale = constants.position_scale[(chunk.offset + jnp.arange(size)) % len(constants.position_scale)]
        learned = same.astype(scale.dtype) @ pairs.parts

        def scaled(summed: Callable) -> LearnerState:
            sums = jax.tree.map(jnp.add, pending.gradients, summed(learned[-1]))
            new = jax.tree.map(lambda w, g: w - scale[-1] * g, base.weights, sums)
            return base._replace(
                weights=select(chunk.complete, new, base.weights),
                pending=select(chunk.complete, constants.blank.pending, pending._replace(gradients=sums)),
            )

        return scaled, _Affine(None, -scale, pending.gradients, scale[:, None] * learned)

    gate = lambda one, a: None if one is None else one.activation(a)
    momenta, decay = gate(optimizer.momentum, x.momentum), gate(optimizer.decay, x.decay)
    of = coefficients(momenta, decay, x.step_size, chunk.real, same, pairs.parts.dtype)
    gathered = pairs.parts if of.gathered is None else of.gathered @ pairs.parts
    kept, carried = of.kept, None if of.carried is None else -of.lasting @ of.carried
    mix = of.lasting @ gathered

    def after(summed: Callable) -> LearnerState:
        weights = base.weights
        if kept is not None:
            weights = jax.tree.map(lambda w: kept[-1] * w, weights)
        weights = jax.tree.map(jnp.subtract, weights, summed(mix[-1]))
        momentum = base.momentum
        if carried is not None and of.carried is not None:
            last = of.carried[-1]
            weights = jax.tree.map(lambda w, s: w + carried[-1] * s, weights, momentum)
            momentum = jax.tree.map(lambda s, g: last * s + g, momentum, summed(gathered[-1]))
        state = base._replace(weights=weights, momentum=momentum)
        return move_anchor(learner, state, weights, chunk, size)

    return after, _Affine(kept, carried, base.momentum, mix)


def _read_out(parts: _Parts, slow: Any, x: Float[Array, "K"], z: Float[Array, "V"]) -> Float[Array, "V"]:
    """The prediction of the model from the output of its MLP."""
    if parts.norm is not None:
        z = z - jnp.mean(z)
        z = z * jax.lax.rsqrt(jnp.mean(z * z) + parts.norm.eps)
        z = z if slow is None else slow.scale * z + slow.bias
    return x + z if parts.residual else z


def _linear(x: Float[Array, "m I"], layer: InnerLayer) -> Float[Array, "m O"]:
    return x @ layer.kernel if layer.bias is None else x @ layer.kernel + layer.bias
