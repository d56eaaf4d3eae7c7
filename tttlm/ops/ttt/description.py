"""The description of a learner: a frozen, hashable object that every implementation reads.

With `W*` the weights at which gradients are taken, `S` the momentum and `U` the accumulated weights, a learner computes
for every token `t`

    e_t = ∂ loss(predict(error_key_t; W*), value_t) / ∂ prediction          the error
    g_t = rate_t e_t pulled back through predict(key_t; W*)                 the gradient
    S   = momentum S + Σ g                                                  at every step
    U   = decay U - step_size transform(S)
    W   = link(U)                                                           what is read
    output_t = model(query_scale q_t; W)

and the clocks define which weights `W*` is, when a step is taken, when queries see it, and when everything is reset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tttlm.errors import InputError
from tttlm.ops.ttt.losses import half_square
from tttlm.ops.ttt.models import MLP, DiagonalLinear
from tttlm.ops.ttt.transforms import factor


@dataclass(frozen=True)
class Gate:
    """A coefficient for every token, `[B, T, H]`.

    Attributes:
        activation: maps the input of the gate to the factor. At a step of several tokens it is applied to their mean.
        per_channel: whether there is one for every key channel, that is every row of a linear model's kernel, so that
            the input is `[B, T, H, K]`.
    """

    activation: Callable = factor
    per_channel: bool = False


@dataclass(frozen=True)
class Optimizer:
    """The optimiser of a learner.

    Attributes:
        rate: learning rates: "token" `[B, T, H]`, "value" for each value channel `[B, T, H, V]`, "matrix" for
            each fast weight (a pytree like the weights with leaves `[B, T, H]`), or None for a rate of one. With a
            window, "token" rates are `[B, T, H, window]`, the newest pair first.
        implicit: whether the step is implicit: `rate / (1 + rate |k|²)` instead of the rate.
        momentum: gate by which `S` is carried from step to step; None for `S` = the gradients of this step.
        decay: gate that multiplies the weights at every step; None keeps them.
        decay_first: whether the gradient is taken at the decayed weights.
        transform: function from one head's `S` to the step (see `tttlm.ops.ttt.transforms`).
        step_size: whether every token has a factor `[B, T, H]` of the transformed step.
        position_scale: whether the step is taken from `W*` at every token, times a factor by the token's position `p`
            since `W*` moved: `W_t = W* - position_scale[p] Σ g` (arXiv 2407.04620).
    """

    rate: Literal["token", "value", "matrix"] | None = "token"
    implicit: bool = False
    momentum: Gate | None = None
    decay: Gate | None = None
    decay_first: bool = False
    transform: Callable | None = None
    step_size: bool = False
    position_scale: bool = False


@dataclass(frozen=True)
class Ridge:
    """No steps: the weights are the minimum of `Σ_s w_s |k_s W - v_s|²/2 + tr(Wᵀ diag(λ) W)/2` (arXiv 2506.05233).

    `w_s` are the rates, decayed; `λ` `[H, K]` are the slow parameters; the initial weights are `RidgeWeights`.

    Attributes:
        decay: gate that multiplies the sums over the past.
    """

    decay: Gate | None = None


@dataclass(frozen=True)
class Clocks:
    """The intervals of a learner, counted in tokens from the start of the sequence.

    Attributes:
        anchor: interval at which `W*` moves to the weights; 1 takes every gradient at the current weights, None keeps
            the initial ones.
        step: number of tokens whose summed gradients make one step of the optimiser.
        visible: a token that completes a step reads the weights after it ("at_step") or before it ("after_step").
        reset: interval at which everything is reset to the initial weights; None never resets.
        writes_per_token: number `n` of keys, values and rates of every token, `[B, T n, ...]`. With an anchor of 1 each
            is a step of its own, after one decay.
    """

    anchor: int | None = 1
    step: int = 1
    visible: Literal["at_step", "after_step"] = "at_step"
    reset: int | None = None
    writes_per_token: int = 1

    @property
    def period(self) -> int:
        """The period of all clocks in tokens."""
        return math.lcm(self.anchor or 1, self.step, self.reset or 1)


@dataclass(frozen=True)
class Learner:
    """A learner: model, loss, optimiser and clocks.

    Attributes:
        model: the inner model (see `tttlm.ops.ttt.models`).
        loss: function of a prediction and its target (see `tttlm.ops.ttt.losses`).
        optimizer: `Optimizer`, or `Ridge` for the exact solve.
        clocks: the intervals of gradients, steps and resets.
        link: function from one head's accumulator and initial weights to the weights that are read and differentiated;
            None reads the accumulator.
        keep_link: whether the accumulator itself is replaced by the result of the link, at every step.
        link_initial: whether a link that is not kept also applies to the initial weights; else they are read directly
            until the first step.
        query_scale: factor of the queries.
        query_projection: queries are multiplied by `P = Σ kᵀk / |k|²` over the tokens since the anchor moved ("anchor")
            or since the last reset ("reset"); None does not project them.
        error_keys: whether the error is taken at separate keys, `[B, T, H, K]`; else at the keys.
        window: number of tokens whose losses are learned from at every token, including itself.

    Raises:
        InputError: the parts cannot be combined.

    >>> Learner(clocks=Clocks(anchor=16), optimizer=Optimizer(momentum=Gate(), decay=Gate(one_minus)))  # Titans
    """

    model: Any = field(default_factory=MLP)
    loss: Callable = half_square
    optimizer: Optimizer | Ridge = field(default_factory=Optimizer)
    clocks: Clocks = field(default_factory=Clocks)
    link: Callable | None = None
    keep_link: bool = False
    link_initial: bool = True
    query_scale: float = 1.0
    query_projection: Literal["anchor", "reset"] | None = None
    error_keys: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        for wrong, message in _meaningless(self):
            if wrong:
                raise InputError(message)
        hash(self)

    @property
    def linear(self) -> bool:
        """Whether the model is one kernel without hidden layers."""
        return isinstance(self.model, MLP) and not self.model.hidden_sizes and not self.model.use_bias


def _meaningless(learner: Learner) -> list[tuple[bool, str]]:
    """Invalid combinations: whether each holds, and its message."""
    clocks, optimizer = learner.clocks, learner.optimizer
    anchor, step, reset, writes = clocks.anchor, clocks.step, clocks.reset, clocks.writes_per_token
    sizes = {"anchor": anchor, "step": step, "reset": reset, "writes_per_token": writes, "window": learner.window}
    rules = [(size is not None and size < 1, f"{name} must be at least 1, got {size}") for name, size in sizes.items()]
    if any(wrong for wrong, _ in rules):
        return rules
    rules += [
        (
            anchor is not None and anchor % step != 0,
            f"the anchor moves at a step: anchor must be a multiple of step, got anchor {anchor} and step {step}",
        ),
        (
            reset is not None and (reset % step != 0 or reset % (anchor or 1) != 0),
            f"reset must be a multiple of anchor and step, got reset {reset}, anchor {anchor}, step {step}",
        ),
        (learner.keep_link and learner.link is None, "keep_link needs a link to keep, got link None"),
        (
            not learner.link_initial and (anchor != step or clocks.visible != "after_step" or learner.keep_link),
            "link_initial=False needs a link that is not kept, an anchor that moves at every step, and 'after_step'",
        ),
        (
            learner.query_projection == "reset" and reset is None,
            "query_projection 'reset' sums since the last reset: set clocks.reset, got None",
        ),
        (
            learner.query_projection == "anchor" and anchor is None,
            "query_projection 'anchor' sums since the anchor moved: set clocks.anchor, got None",
        ),
        (
            learner.window > 1 and writes > 1,
            f"a window is of tokens with one write each, got window {learner.window} and writes_per_token {writes}",
        ),
    ]
    if isinstance(optimizer, Ridge):
        plain = clocks == Clocks() and learner.window == 1 and not (learner.error_keys or learner.link)
        return [
            *rules,
            (
                not (learner.linear and learner.loss is half_square and plain),
                "Ridge solves for a linear model with half_square loss, and has no clocks, window, error keys or link",
            ),
            (
                optimizer.decay is not None and optimizer.decay.per_channel,
                "Ridge weighs whole tokens: its decay has one gate for every head, got a gate per channel",
            ),
        ]
    return rules + _meaningless_optimizer(learner, optimizer)


def _meaningless_optimizer(learner: Learner, optimizer: Optimizer) -> list[tuple[bool, str]]:
    clocks = learner.clocks
    every_token = clocks.anchor == 1 and clocks.step == 1
    shaped = any((optimizer.momentum, optimizer.transform, optimizer.step_size))
    bare = isinstance(learner.model, DiagonalLinear) or learner.linear
    gates = [gate for gate in (optimizer.momentum, optimizer.decay) if gate is not None and gate.per_channel]
    scaled = optimizer.position_scale
    return [
        (
            optimizer.decay_first and (optimizer.decay is None or not every_token),
            "decay_first takes the gradient at weights just decayed: it needs a decay, and anchor 1 and step 1",
        ),
        (bool(gates) and not bare, "a gate per channel needs a linear model without bias, whose rows are the channels"),
        (
            optimizer.implicit and not (bare and learner.loss is half_square and every_token and not shaped),
            "the implicit step needs a linear model with half_square loss, anchor 1, and no momentum or transform",
        ),
        (
            clocks.writes_per_token > 1 and clocks.anchor == 1 and (shaped or learner.link is not None),
            "several steps a token are plain steps: they have no momentum, transform or link",
        ),
        (
            optimizer.step_size and clocks.step > 1,
            f"step_size is of a step of one token, got step {clocks.step}: put the factor into the rates",
        ),
        (
            learner.window > 1 and optimizer.rate != "token",
            f"a window needs rate 'token', [B, T, H, window], got {optimizer.rate!r}",
        ),
        (
            scaled and (clocks.anchor is None or clocks.step > 1 or clocks.visible != "at_step"),
            "position_scale counts tokens since the anchor moved: it needs an anchor and steps of one token",
        ),
        (
            scaled and (shaped or optimizer.decay is not None or learner.link is not None),
            "position_scale steps from the anchor again at every token: it has no momentum, decay, transform or link",
        ),
    ]
