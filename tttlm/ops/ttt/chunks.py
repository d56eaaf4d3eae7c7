"""The scan over chunks of the faster implementations: sequences are shifted so that their chunks are aligned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState
from tttlm.ops.ttt.problem import Problem
from tttlm.ops.ttt.reference import by_head, of_heads


class Chunk(NamedTuple):
    """The `m` slots of one chunk; slots without a token are like padding.

    Attributes:
        offset: offset of the first slot of every sequence in the period of the clocks.
        real: which slots have a token that is not padding.
        begins: whether the first slot of the chunk is one of the given tokens.
        complete: whether the last slot of the chunk is.
        reset: whether a document starts at the first slot; None without documents.
        document: index of every slot's document (see `Documents`); None if the chunk has one document.
        starts_mid_chunk: whether a document starts after the first slot in any sequence.
    """

    offset: Int[Array, "*N B"]
    real: Bool[Array, "*N B m"]
    begins: Bool[Array, "*N B"]
    complete: Bool[Array, "*N B"]
    reset: Bool[Array, "*N B"] | None
    document: Int[Array, "*N B m"] | None
    starts_mid_chunk: Bool[Array, "*N"] | None


Step = Callable[[LearnerState, LearnerInputs, Chunk], tuple[LearnerState, Float[Array, "B H m V"]]]


def over_chunks(
    problem: Problem, size: int, step: Step, *, clocked: bool = True
) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """Outputs, and the state after the last token.

    Args:
        problem: what to compute.
        size: tokens `m` of a chunk.
        step: computes one chunk: from the state of all heads, `[B, H, ...]`, the inputs `[B, H, m, ...]` (with an axis
            for the writes of a token after `m`) and the chunk, to the next state and the outputs.
        clocked: whether chunks are bound to the clocks; else they start with the first token.
    """
    state, docs = problem.state, problem.docs
    batch, time, heads, _ = problem.inputs.queries.shape
    period = problem.learner.clocks.period
    first = state.offset % size if clocked else jnp.zeros_like(state.offset)
    start = state.offset - first
    if time == 1 or not clocked or problem.at_start:  # nothing to shift
        start, first, shifted = state.offset, jnp.zeros_like(first), False
        slots = 1 if time == 1 else min(size, time)
        count = -(-time // slots)
    else:
        shifted, slots, count = True, size, -(-(time + size - 1) // size)
    total, behind = count * slots, first + problem.positions

    def place(a: Array, fill: Any = 0) -> Array:
        """`[B, T, ...]` to `[B, count slots, ...]`, every row from its first slot on."""
        if not shifted:
            pads = ((0, 0), (0, total - time)) + ((0, 0),) * (a.ndim - 2)
            return jnp.pad(a, pads, mode="edge" if fill is None else "constant")
        blank = jnp.zeros((batch, total, *a.shape[2:]), a.dtype)
        if fill is None:  # before the first token is the document carried in, behind the last the one in progress
            blank = jnp.where(jnp.arange(total) >= first[:, None], a[:, -1:], 0)
        return jax.vmap(lambda to, row, at: jax.lax.dynamic_update_slice_in_dim(to, row, at, 0))(blank, a, first)

    def split(a: Array) -> Array:  # [B, total, ...] to [N, B, m, ...]
        return a.reshape(batch, count, slots, *a.shape[2:]).swapaxes(0, 1)

    by_row = lambda a: a.swapaxes(1, 2)
    inputs = jax.tree.map(lambda a: by_row(a) if a is not None else None, by_head(problem))  # [B, T, H, (n), ...]
    xs = jax.tree.map(lambda a: split(place(a)), inputs)
    real = place(jnp.ones((batch, time), bool) if docs is None else docs.real)
    begin = jnp.arange(count, dtype=jnp.int32)[:, None] * slots  # [N, 1], of the shifted rows
    ends = (start + begin + slots) % size == 0 if clocked else jnp.zeros((count, batch), bool)
    index = None if docs is None else place(docs.index, None)
    reset = document = starts_mid_chunk = None
    if index is not None:
        by_chunk = split(index)
        before = jnp.concatenate([jnp.zeros((1, batch), index.dtype), by_chunk[:-1, :, -1]])
        reset = by_chunk[:, :, 0] != before
        # `aligned` determines where documents start in a chunk only if chunks are aligned with the clocks.
        if slots > 1 and not (problem.aligned and clocked and period % size == 0):
            document = by_chunk
            starts_mid_chunk = jnp.any(by_chunk != by_chunk[:, :, :1], axis=(1, 2))
    chunks = Chunk(
        offset=(start + begin) % period,
        real=split(real),
        begins=(begin >= first) & (begin < behind) & jnp.ones((1, batch), bool),
        complete=ends & (begin + slots <= behind),
        reset=reset,
        document=document,
        starts_mid_chunk=starts_mid_chunk,
    )

    def one(carry: LearnerState, xs: tuple[LearnerInputs, Chunk, Array]) -> tuple[LearnerState, Array]:
        inputs, chunk, any_token = xs

        def compute() -> tuple[LearnerState, Array]:
            after, out = step(carry, jax.tree.map(by_row, inputs), chunk)
            return after, by_row(out)

        if not shifted:
            return compute()
        # Rows that start with a chunk need none for what was shifted out.
        _, out = jax.eval_shape(compute)
        return jax.lax.cond(any_token, compute, lambda: (carry, jnp.zeros(out.shape, out.dtype)))

    any_token = jnp.any(begin < behind, axis=1)
    carry, out = remat_scan(one, of_heads(state), (xs, chunks, any_token), problem.remat_chunks)
    out = out.swapaxes(0, 1).reshape(batch, total, heads, -1)
    if shifted:
        out = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, time))(out, first)
    return out[:, :time], carry._replace(offset=problem.next_offset, document=state.document)


def remat_scan(step: Callable, carry: Any, xs: Any, group: int) -> tuple[Any, Any]:
    """`jax.lax.scan` whose backward pass stores the carry before every `group` steps, and recomputes the rest."""
    step = jax.checkpoint(step, prevent_cse=False)
    groups, rest = divmod(len(jax.tree.leaves(xs)[0]), group)
    if group == 1 or not groups:
        return jax.lax.scan(step, carry, xs)
    several = jax.checkpoint(lambda carry, xs: jax.lax.scan(step, carry, xs), prevent_cse=False)
    grouped = jax.tree.map(lambda a: a[: groups * group].reshape(groups, group, *a.shape[1:]), xs)
    carry, ys = jax.lax.scan(several, carry, grouped)
    ys = jax.tree.map(lambda a: a.reshape(groups * group, *a.shape[2:]), ys)
    if rest:
        carry, last = jax.lax.scan(step, carry, jax.tree.map(lambda a: a[groups * group :], xs))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, last)
    return carry, ys
