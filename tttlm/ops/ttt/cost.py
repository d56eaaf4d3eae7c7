"""Shapes of a learner's inputs and weights, and its FLOPs per token, from its description."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from tttlm.ops.ttt.description import Gate, Learner, Ridge
from tttlm.ops.ttt.learn import learn
from tttlm.ops.ttt.learner_state import LearnerInputs
from tttlm.ops.ttt.models import RidgeWeights


def initial_weights(learner: Learner, num_heads: int, key_dim: int, value_dim: int) -> Any:
    """Shapes and dtypes of the initial weights `[H, ...]`."""
    if isinstance(learner.optimizer, Ridge):
        shapes = ((num_heads, key_dim, key_dim), (num_heads, key_dim, value_dim))
        return jax.eval_shape(lambda: RidgeWeights(*(jnp.zeros(shape) for shape in shapes)))
    return jax.eval_shape(lambda: learner.model.init(jax.random.key(0), num_heads, key_dim, value_dim))


def rates_per_write(learner: Learner, num_heads: int, key_dim: int, value_dim: int) -> int:
    """The number of rates of every write of a head; 0 if the learner has none."""
    if isinstance(learner.optimizer, Ridge):
        return 1
    rate = learner.optimizer.rate
    if rate == "matrix":
        return len(jax.tree.leaves(initial_weights(learner, num_heads, key_dim, value_dim)))
    return {None: 0, "value": value_dim, "token": learner.window}[rate]


def input_shapes(learner: Learner, time: int, key_dim: int, value_dim: int) -> LearnerInputs:
    """The inputs of one sequence and one head, as shapes."""
    optimizer, written = learner.optimizer, time * learner.clocks.writes_per_token

    def struct(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def gate(one: Gate | None) -> Any:
        return None if one is None else struct(time, 1, key_dim) if one.per_channel else struct(time, 1)

    kind, rates = getattr(optimizer, "rate", "token"), None
    if kind == "matrix":
        rates = jax.tree.map(lambda _: struct(written, 1), initial_weights(learner, 1, key_dim, value_dim))
    elif kind == "value" or learner.window > 1:
        rates = struct(written, 1, rates_per_write(learner, 1, key_dim, value_dim))
    elif kind == "token":
        rates = struct(written, 1)
    return LearnerInputs(
        queries=struct(time, 1, key_dim),
        keys=struct(written, 1, key_dim),
        values=struct(written, 1, value_dim),
        rates=rates,
        momentum=gate(getattr(optimizer, "momentum", None)),
        decay=gate(optimizer.decay),
        step_size=struct(time, 1) if getattr(optimizer, "step_size", False) else None,
        error_keys=struct(written, 1, key_dim) if learner.error_keys else None,
    )


@cache
def flops_per_token(
    learner: Learner, key_dim: int, value_dim: int, sequence_length: int, implementation: str | None = None
) -> float:
    """FLOPs of `learn` per token and head, the mean over a sequence of that length.

    They are counted in the traced program, with loops multiplied by their trip count, so that this holds for any
    description; nothing is compiled. A multiply-add of a matrix product counts as two.

    Args:
        learner: the description.
        key_dim: size `K` of a key.
        value_dim: size `V` of a value.
        sequence_length: tokens of a sequence.
        implementation: as in `learn`.
    """
    inputs = input_shapes(learner, sequence_length, key_dim, value_dim)
    weights = initial_weights(learner, 1, key_dim, value_dim)
    slow: Any = None
    if isinstance(learner.optimizer, Ridge):
        slow = jax.ShapeDtypeStruct((1, key_dim), jnp.float32)
    elif hasattr(learner.model, "init_slow"):
        slow = jax.eval_shape(lambda: learner.model.init_slow(1, value_dim))
    scale: Any = None
    if getattr(learner.optimizer, "position_scale", False):
        scale = jax.ShapeDtypeStruct((learner.clocks.anchor or 1,), jnp.float32)

    def run(inputs, weights, slow, scale):
        options = {"slow": slow, "position_scale": scale, "implementation": implementation}
        return learn(learner, inputs, weights, **options)[0]

    return _operations(jax.make_jaxpr(run)(inputs, weights, slow, scale).jaxpr) / sequence_length


def _operations(jaxpr: Any) -> float:
    """FLOPs of a program; of branches the most expensive one counts."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        shape: tuple[int, ...] = eqn.invars[0].aval.shape if eqn.invars else ()
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[n] for n in contracted)
        elif name in ("mul", "add", "sub"):
            total += eqn.outvars[0].aval.size
        elif name == "triangular_solve":
            total += eqn.outvars[0].aval.size * shape[-1]
        elif name == "lu":
            total += 2 / 3 * math.prod(shape) * shape[-1]
        elif name == "custom_linear_solve":
            total += _operations(eqn.params["jaxprs"].solve.jaxpr)
        elif name == "cond":
            total += max(_operations(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            turns = eqn.params["length"] if name == "scan" else 1
            inside = [value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
            total += turns * sum(_operations(getattr(body, "jaxpr", body)) for body in inside[:1])
    return total
