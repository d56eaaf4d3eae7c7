"""A chunk whose gradients are all taken at one anchor: the code common to implementations with such chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tttlm.ops.ttt.chunks import Chunk, over_chunks
from tttlm.ops.ttt.description import Learner
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, Window, carries_anchor
from tttlm.ops.ttt.problem import Problem, select
from tttlm.ops.ttt.reference import Constants, of_heads

FREE_CHUNK = 64  # tokens of a chunk that no clock bounds


class Pairs(NamedTuple):
    """The pairs whose gradients are taken: `P` writes, and their coefficients for every token, `[m, P]`.

    `parts` are zero or one, except with a window, where they are its rates.
    """

    keys: Float[Array, "P K"]
    error_keys: Float[Array, "P K"]
    values: Float[Array, "P V"]
    rates: Any
    parts: Float[Array, "m P"]


class Tokens(NamedTuple):
    """The tokens of a chunk of one head.

    Attributes:
        inputs: the inputs, `[m, ...]`.
        queries: the queries, as the model reads them.
        pairs: the pairs whose gradients are taken.
        in_last: which tokens are of the last document.
        same: which tokens `s <= t` are of the document of `t`.
    """

    inputs: LearnerInputs
    queries: Float[Array, "m K"]
    pairs: Pairs
    in_last: Bool[Array, "m"]
    same: Bool[Array, "m m"]


# Computes a chunk of one head from a state: the state after it, of the last document, and outputs.
Steps = Callable[[Learner, Constants, LearnerState, Tokens, Chunk], tuple[LearnerState, Float[Array, "m V"]]]
# Axes of a `Chunk` by sequence; `starts_mid_chunk` is one value for all sequences, so that a branch is not a select.
ROWS: Any = Chunk(0, 0, 0, 0, 0, 0, None)  # type: ignore[arg-type]


def anchored(problem: Problem, steps: Steps) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """Outputs and the next state, chunk by chunk as `steps` computes them."""
    clocks = problem.learner.clocks
    constants = Constants(of_heads(problem.blank), problem.slow, problem.position_scale)
    over_heads = jax.vmap(partial(_chunk, problem.learner, steps), (Constants(0, 0, None), 0, 0, None))  # type: ignore[arg-type]
    over_rows = jax.vmap(over_heads, (None, 0, 0, ROWS))
    size = clocks.step if clocks.step > 1 else clocks.anchor or clocks.reset or FREE_CHUNK
    return over_chunks(problem, size, lambda carry, x, chunk: over_rows(constants, carry, x, chunk))


def _chunk(
    learner: Learner, steps: Steps, constants: Constants, carry: LearnerState, x: LearnerInputs, chunk: Chunk
) -> tuple[LearnerState, Float[Array, "m V"]]:
    """One chunk of one head, all of whose gradients are taken at one anchor."""
    clocks, blank = learner.clocks, constants.blank
    size = x.queries.shape[0]
    if chunk.reset is not None:
        carry = select(chunk.reset, blank, carry)
    if clocks.reset is not None:
        carry = select(chunk.begins & (chunk.offset % clocks.reset == 0), blank, carry)
    same, in_new_document = jnp.tril(jnp.ones((size, size), bool)), None
    in_last = chunk.real
    if chunk.document is not None:
        same, in_new_document = same & (chunk.document[:, None] == chunk.document), chunk.document != chunk.document[0]
        in_last = chunk.real & (chunk.document == chunk.document[-1])

    queries = x.queries * learner.query_scale
    if learner.query_projection is not None:
        queries, seen = _project(learner, queries, x.keys, carry, chunk, same, in_new_document, in_last)
        carry = carry._replace(seen=seen)
    pairs, window = _pairs(learner, carry, x, chunk.real, same, in_last)
    carry = carry._replace(window=window)
    tokens = Tokens(x, queries, pairs, in_last, same)
    run = lambda base: steps(learner, constants, base, tokens, chunk)
    after, out = run(carry)
    if in_new_document is not None:

        def with_new_documents() -> tuple[LearnerState, Array]:
            new_after, new_out = run(blank._replace(window=carry.window, seen=carry.seen))
            return select(in_new_document[-1], new_after, after), jnp.where(in_new_document[:, None], new_out, out)

        after, out = jax.lax.cond(chunk.starts_mid_chunk, with_new_documents, lambda: (after, out))
    return after, out


def by(coefficient: Array, like: Array) -> Array:
    """`coefficient` with trailing axes of size one, to multiply `like`."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def mix(coefficient: Array, tree: Any) -> Any:
    """`Σ_s coefficient_ts a_s` for every leaf."""
    return jax.tree.map(lambda a: jnp.tensordot(coefficient.astype(a.dtype), a, 1), tree)


def move_anchor(learner: Learner, state: LearnerState, read: Any, chunk: Chunk, size: int) -> LearnerState:
    """The state after moving the anchor to the weights that are read, if the chunk ends at such a time."""
    if not carries_anchor(learner):
        return state
    assert learner.clocks.anchor is not None
    moves = chunk.complete & ((chunk.offset + size) % learner.clocks.anchor == 0)
    return state._replace(anchor=select(moves, read, state.anchor))


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
    # Pairs are identified by how many real tokens are between them; those of the window are of the first slot's
    # document.
    rank = jnp.concatenate([jnp.arange(1 - before, 1), jnp.cumsum(real)])
    ago = rank[before:, None] - rank  # [m, P]
    seen = jnp.concatenate([jnp.repeat(same[:, :1], before, axis=1), same], axis=1)
    seen = seen & valid & real[:, None] & (ago >= 0) & (ago < learner.window)
    rates = x.rates[:, 0]  # [m, window]
    parts = jnp.where(seen, jnp.take_along_axis(rates, jnp.clip(ago, 0, before), axis=1), 0)
    pairs = Pairs(keys, keys, values, jnp.ones(len(keys), dtype), parts)

    pair_in_last = jnp.concatenate([jnp.repeat(same[-1, 0], before), in_last]) & valid
    order = jnp.cumsum(pair_in_last)
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
    in_new_document: Bool[Array, "m"] | None,
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
    if in_new_document is not None:
        of_carried = jnp.where(in_new_document[:, None], 0, of_carried)
        seen = jnp.where(in_new_document[-1], 0, seen)
    after = seen + jnp.einsum("snk,snl->kl", jnp.where(in_last[:, None, None], unit, 0), keys)
    return of_carried + jnp.einsum("tsn,snk->tk", scores, keys), after
