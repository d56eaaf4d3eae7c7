"""Which tokens of a sequence belong to one document, by the rule that every layer follows.

`segment_ids` `[B, T]` separates the documents of a sequence; 0 is padding. Padding counts as a position but is neither
read nor written; padding after the `lengths` of sequences does not count as a position. The *document in progress* is
that of the last token that is not padding; a token with another id starts a new document, so ids need not be unique
within a sequence. A state carries the id of the document in progress.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tttlm.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """The documents of a batch of sequences.

    Attributes:
        index: 0 for the document that is carried in, 1 for the first that starts here, and so on; padding has the index
            of the document in progress.
        real: False at padding.
        start: True at the first token of every document that starts here.
        last: the id of the document in progress after the last token.
        lengths: number of tokens of each sequence that count as positions, from the front; None for all.
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
"""The documents of a call: ids, 0 for padding; or the result of `documents`; or None for one document."""


def documents(
    segment_ids: SegmentIds, carried: Int[Array, "B"] | None = None, lengths: Int[Array, "B"] | None = None
) -> Documents | None:
    """Reads `segment_ids`, continuing from the ids `carried` in progress (0, or None, before the first token).

    With `lengths`, so many tokens of each sequence count as positions; after them `segment_ids` are 0.

    Raises:
        InputError: the ids are not integers.
    """
    if segment_ids is None or isinstance(segment_ids, Documents):
        return segment_ids
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise InputError(f"segment_ids must be integers, 0 for padding; got {segment_ids.dtype} {segment_ids.shape}")
    segment_ids = segment_ids.astype(jnp.int32)  # the dtype of a state
    if carried is None:
        carried = jnp.zeros(segment_ids.shape[:1], jnp.int32)
    real = segment_ids != 0
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(real, positions, -1), axis=1)  # the last position <= t that is not padding
    here = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    in_progress = jnp.where(latest >= 0, here, carried[:, None])
    before = jnp.concatenate([carried[:, None], in_progress[:, :-1]], axis=1)
    start = real & (segment_ids != before)
    return Documents(jnp.cumsum(start, axis=1, dtype=jnp.int32), real, start, in_progress[:, -1], lengths)


def num_positions(docs: Documents | None, time: int) -> int | Int[Array, "B"]:
    """The number of positions of `time` tokens, equal for all sequences or one for each."""
    return time if docs is None or docs.lengths is None else docs.lengths


def document_in_progress(carried: Int[Array, "B"], docs: Documents | None) -> Int[Array, "B"]:
    """The next id to carry; without `segment_ids` all tokens belong to the document in progress, or to document 1."""
    return jnp.where(carried == 0, 1, carried) if docs is None else docs.last


def positions_in_document(
    docs: Documents | None, time: int, carried: Int[Array, "B"]
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The number of positions of its document before every token, and before the token after the last.

    Args:
        docs: the documents; None for one document.
        time: number of tokens `T`.
        carried: positions of the document in progress before the first token.
    """
    positions = carried[:, None] + jnp.arange(time, dtype=jnp.int32)
    if docs is None:
        return positions, carried + time
    starts = jax.lax.cummax(jnp.where(docs.start, positions, 0), axis=1)
    started = docs.index > 0
    after = carried + num_positions(docs, time)
    after = after - jnp.where(started[:, -1], starts[:, -1], 0)
    return jnp.where(started, positions - starts, positions), after
