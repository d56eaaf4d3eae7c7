"""Writes whose target looks ahead: a convolution over the neighbours of a token, within its chunk.

In-Place TTT (arXiv 2604.06169) writes `h_sᵀ y_s` with `y_s = Σ_j conv_j ∘ x_{s+j-A}`, `A` taps of it ahead, which is
known only `A` tokens later. Under a loss linear in the target the same sum is had from what each token knows: its own
key with the taps behind, and the keys of the tokens before it with what the token adds to their targets.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.documents import Documents, num_positions


class Neighbors(NamedTuple):
    """The last keys `[B, A, F]` and inputs `[B, A, D]` of the document in progress; zeros where it has fewer."""

    keys: Float[Array, "B A F"]
    inputs: Float[Array, "B A D"]


def neighbor_writes(
    keys: Float[Array, "B T F"],
    inputs: Float[Array, "B T D"],
    conv: Float[Array, "D J"],
    chunk_size: int,
    *,
    tail: Neighbors | None = None,
    offset: Int[Array, "B"] | None = None,
    docs: Documents | None = None,
) -> tuple[Float[Array, "B Tn F"], Float[Array, "B Tn D"], Neighbors]:
    """The `1 + A` writes of every token, in the order of `Clocks.writes_per_token`.

    Args:
        keys: keys of the tokens.
        inputs: inputs of the convolution that makes the targets.
        conv: `J = 2 A + 1` taps for each channel, the first for the token `A` positions before.
        chunk_size: tokens of a chunk, beyond which the convolution does not reach.
        tail: the previous keys and inputs; None at the start of a sequence.
        offset: offset of each sequence in its chunk; None at its start.
        docs: documents of the sequences, which are independent.

    Returns:
        Keys and targets of the writes, and the next tail.
    """
    (batch, time, _), ahead = keys.shape, conv.shape[1] // 2
    if tail is None:
        tail = Neighbors(*(jnp.zeros((batch, ahead, a.shape[-1]), a.dtype) for a in (keys, inputs)))
    first = jnp.zeros((batch, 1), jnp.int32) if offset is None else offset[:, None]
    position = (first + jnp.arange(time)) % chunk_size
    index = jnp.zeros((batch, time), jnp.int32)
    if docs is not None:
        index = docs.index
        keys, inputs = (jnp.where(docs.real[..., None], a, 0) for a in (keys, inputs))
    index = jnp.concatenate([jnp.zeros((batch, ahead), jnp.int32), index], axis=1)
    keys, inputs = (jnp.concatenate([old, new], axis=1) for old, new in zip(tail, (keys, inputs), strict=True))

    def back(a, by):  # of every token, what stands `by` before it
        return a[:, ahead - by : ahead - by + time]

    near = [((position >= by) & (back(index, by) == back(index, 0)))[..., None] for by in range(ahead + 1)]
    own = sum(jnp.where(near[by], conv[:, ahead - by] * back(inputs, by), 0) for by in range(ahead + 1))
    later = [jnp.where(near[by], conv[:, ahead + by] * back(inputs, 0), 0) for by in range(1, ahead + 1)]
    of_writes = lambda parts: jnp.stack(parts, axis=2).reshape(batch, time * (1 + ahead), -1)
    after = Neighbors(keys[:, time:], inputs[:, time:])
    if docs is not None:  # the tokens before the next one, of its document alone
        taken = jnp.broadcast_to(jnp.asarray(num_positions(docs, time)), (batch,))
        last = taken[:, None] + jnp.arange(ahead)
        kept = jnp.take_along_axis(index, last, axis=1) == docs.last_index[:, None]
        at_last = lambda a: jnp.take_along_axis(a, last[..., None], axis=1)
        after = Neighbors(*(jnp.where(kept[..., None], at_last(a), 0) for a in (keys, inputs)))
    return of_writes([back(keys, by) for by in range(ahead + 1)]), of_writes([own, *later]), after
