"""Which tokens of a sequence belong to one document: the one rule that every layer follows.

`segment_ids` `[B, T]` tells the documents of a sequence apart; 0 is padding. Padding takes a position but is neither
read nor written; where sequences have `lengths`, what is behind them takes no position either. The *document in
progress* is that of the last token that is no padding; a token with another id starts a new document, so ids need not
be unique within a sequence. A state carries the id in progress.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tttlm.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """The documents of a stretch of sequences.

    Attributes:
        index: 0 for the document carried in, 1 for the first that starts here, and so on; padding has the index of
            the document in progress.
        real: False at padding.
        start: True at the first token of every document that starts here.
        last: the id in progress after the last token.
        lengths: how many tokens of each sequence take a position, from the front; None for all.
    """

    index: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    start: Bool[Array, "B T"]
    last: Int[Array, "B"]
    lengths: Int[Array, "B"] | None = None

    @property
    def last_index(self) -> Int[Array, "B"]:
        """`index` of the document in progress after the last token."""
        return self.index[:, -1]


SegmentIds = Int[Array, "B T"] | Documents | None
"""What tells the documents of a call apart: ids, 0 for padding; ids that were read already; None where all is one."""


def documents(
    segment_ids: SegmentIds, carried: Int[Array, "B"] | None = None, lengths: Int[Array, "B"] | None = None
) -> Documents | None:
    """Reads `segment_ids`, going on from the ids `carried` in progress (0, or None, before the first token).

    With `lengths`, so many tokens of each sequence take a position; behind them `segment_ids` are 0.

    Raises:
        InputError: the ids are no integers.
    """
    if segment_ids is None or isinstance(segment_ids, Documents):
        return segment_ids
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise InputError(f"segment_ids must be integers, 0 for padding; got {segment_ids.dtype} {segment_ids.shape}")
    segment_ids = segment_ids.astype(jnp.int32)  # that of a state
    if carried is None:
        carried = jnp.zeros(segment_ids.shape[:1], jnp.int32)
    real = segment_ids != 0
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(real, positions, -1), axis=1)  # the last place <= t that is no padding
    here = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    in_progress = jnp.where(latest >= 0, here, carried[:, None])
    before = jnp.concatenate([carried[:, None], in_progress[:, :-1]], axis=1)
    start = real & (segment_ids != before)
    return Documents(jnp.cumsum(start, axis=1, dtype=jnp.int32), real, start, in_progress[:, -1], lengths)


def num_positions(docs: Documents | None, time: int) -> int | Int[Array, "B"]:
    """How many positions `time` tokens take, in every sequence or in each."""
    return time if docs is None or docs.lengths is None else docs.lengths


def document_in_progress(carried: Int[Array, "B"], docs: Documents | None) -> Int[Array, "B"]:
    """The id to carry on; without `segment_ids` every token belongs to the document in progress, or to document 1."""
    return jnp.where(carried == 0, 1, carried) if docs is None else docs.last


def positions_in_document(
    docs: Documents | None, time: int, carried: Int[Array, "B"]
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """How many positions of its document are before every token, and before the token after the last.

    Args:
        docs: the documents; None where all is one.
        time: tokens `T`.
        carried: positions of the document in progress that were taken before the first token.
    """
    positions = carried[:, None] + jnp.arange(time, dtype=jnp.int32)
    if docs is None:
        return positions, carried + time
    starts = jax.lax.cummax(jnp.where(docs.start, positions, 0), axis=1)
    begun = docs.index > 0
    after = carried + num_positions(docs, time)
    after = after - jnp.where(begun[:, -1], starts[:, -1], 0)
    return jnp.where(begun, positions - starts, positions), after
