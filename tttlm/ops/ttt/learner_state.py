"""The inputs of a learner, and the state that every learner carries from token to token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tttlm.ops.ttt.description import Learner, Ridge


class LearnerInputs(NamedTuple):
    """The inputs of a learner; `n` is the number of writes per token, usually one.

    Attributes:
        queries: queries `[B, T, H, K]`.
        keys: keys `[B, T n, H, K]`.
        values: targets of the loss, `[B, T n, H, V]`.
        rates: learning rates, shaped as `Optimizer.rate` says; None if that is None.
        momentum: input of the gate `Optimizer.momentum`, or None.
        decay: input of the gate `Optimizer.decay`, or None.
        step_size: factor of the transformed step, `[B, T, H]`, or None.
        error_keys: keys whose error is taken, `[B, T n, H, K]`, or None.
    """

    queries: Float[Array, "B T H K"]
    keys: Float[Array, "B Tn H K"]
    values: Float[Array, "B Tn H V"]
    rates: Any = None
    momentum: Float[Array, "B T H *K"] | None = None
    decay: Float[Array, "B T H *K"] | None = None
    step_size: Float[Array, "B T H"] | None = None
    error_keys: Float[Array, "B Tn H K"] | None = None


class Pending(NamedTuple):
    """The sums over the tokens of an incomplete step.

    Attributes:
        gradients: sum of their gradients, shaped like the weights `[B, H, ...]`.
        momentum, decay: sums of the inputs of the gates, `[B, H]` or `[B, H, K]`; None without the gate.
        num_tokens: number of tokens, `[B, H]`; None if nothing is averaged (`Optimizer.position_scale`).
    """

    gradients: Any
    momentum: Float[Array, "*B"] | None
    decay: Float[Array, "*B"] | None
    num_tokens: Float[Array, "*B"] | float | None


class Window(NamedTuple):
    """The last `window - 1` pairs, the newest last, `[B, H, window - 1, ...]`; `valid` says which there are."""

    keys: Float[Array, "*B W K"]
    values: Float[Array, "*B W V"]
    valid: Bool[Array, "*B W"]


class LearnerState(NamedTuple):
    """The state from which a sequence can be continued at any token; parts that a learner does not need are None.

    Attributes:
        weights: the accumulated weights `[B, H, ...]`; with `position_scale` those at the anchor.
        anchor: the weights at which gradients are taken, if they are neither the weights nor the initial ones.
        momentum: `S`, shaped like the weights.
        pending: the step in progress.
        window: the pairs in the window of the next tokens.
        seen: `P` of the query projection, `[B, H, K, K]`.
        offset: number of tokens since all clocks were at zero, `0..period-1`. Offset and document belong to a
            sequence; they are None in the state of a head, within an implementation.
        document: id of the document in progress, 0 before the first token (see `tttlm.ops.documents`).
    """

    weights: Any
    anchor: Any
    momentum: Any
    pending: Pending | None
    window: Window | None
    seen: Float[Array, "*B K K"] | None
    offset: Int[Array, "*B"]
    document: Int[Array, "*B"]


def carries_anchor(learner: Learner) -> bool:
    """Whether the anchor is neither the weights that are read nor the initial ones."""
    clocks, optimizer = learner.clocks, learner.optimizer
    if isinstance(optimizer, Ridge) or optimizer.position_scale:
        return False
    return not learner.link_initial or (clocks.anchor is not None and clocks.anchor != clocks.step)


def read_weights(learner: Learner, accumulated: Any, initial: Any) -> Any:
    """The weights of one head that are read and differentiated; a link that is kept was applied at the step."""
    return accumulated if learner.link is None or learner.keep_link else learner.link(accumulated, initial)


def blank(learner: Learner, weights: Any, keys: int, values: int) -> LearnerState:
    """The state before the first token of one sequence, `[H, ...]`, with offset and document of `[]`.

    Args:
        learner: the description.
        weights: initial weights `[H, ...]`.
        keys: size `K` of a key.
        values: size `V` of a value.
    """
    optimizer, clocks = learner.optimizer, learner.clocks
    leaf = jax.tree.leaves(weights)[0]
    heads, dtype = leaf.shape[0], jnp.promote_types(leaf.dtype, jnp.float32)
    weights = jax.tree.map(lambda w: w.astype(dtype), weights)
    zeros, zero = jax.tree.map(jnp.zeros_like, weights), jnp.zeros((), jnp.int32)
    if isinstance(optimizer, Ridge):
        weights = weights._replace(kk=(weights.kk + weights.kk.mT) / 2)
        return LearnerState(weights, None, None, None, None, None, zero, zero)

    def sums(gate):
        return None if gate is None else jnp.zeros((heads, keys) if gate.per_channel else (heads,), dtype)

    pending = None
    if optimizer.position_scale:
        pending = Pending(zeros, None, None, None)
    elif clocks.step > 1:
        pending = Pending(zeros, sums(optimizer.momentum), sums(optimizer.decay), jnp.zeros((heads,), dtype))
    window = None
    if learner.window > 1:
        shape = (heads, learner.window - 1)
        window = Window(jnp.zeros((*shape, keys), dtype), jnp.zeros((*shape, values), dtype), jnp.zeros(shape, bool))
    read = jax.vmap(lambda w: read_weights(learner, w, w))(weights) if learner.link_initial else weights
    return LearnerState(
        weights=weights,
        anchor=read if carries_anchor(learner) else None,
        momentum=None if optimizer.momentum is None else zeros,
        pending=pending,
        window=window,
        seen=None if learner.query_projection is None else jnp.zeros((heads, keys, keys), dtype),
        offset=zero,
        document=zero,
    )


def init_learner_state(learner: Learner, weights: Any, batch: int, key_dim: int, value_dim: int) -> LearnerState:
    """The state before the first token: every sequence has the initial `weights`, in float32 at least.

    Args:
        learner: the description.
        weights: initial weights of the inner model, `[H, ...]`.
        batch: number of sequences `B`.
        key_dim: size `K` of a key.
        value_dim: size `V` of a value.
    """
    state = blank(learner, weights, key_dim, value_dim)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), state)
