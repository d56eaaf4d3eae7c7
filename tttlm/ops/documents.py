"""Which tokens of a row belong to one document: the one rule that every layer follows.

`segment_ids` `[B, T]` tells the documents of a row apart; 0 is padding. Padding takes a place in the row but is
neither read nor written. The *document in progress* is that of the last token that is no padding; a token with
another id starts a new document, so ids need not be unique within a row. A state carries the id in progress.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """The documents of a stretch of rows.

    Attributes:
        index: 0 for the document carried in, 1 for the first that starts here, and so on; padding has the index of
            the document in progress.
        real: False at padding.
        start: True at the first token of every document that starts here.
        last: the id in progress after the last token.
    """

    index: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    start: Bool[Array, "B T"]
    last: Int[Array, "B"]

    @property
    def last_index(self) -> Int[Array, "B"]:
        """`index` of the document in progress after the last token."""
        return self.index[:, -1]


def documents(segment_ids: Int[Array, "B T"], carried: Int[Array, "B"]) -> Documents:
    """Reads `segment_ids`, going on from the ids `carried` in progress (0 before the first token)."""
    real = segment_ids != 0
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(real, positions, -1), axis=1)  # the last place <= t that is no padding
    here = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    in_progress = jnp.where(latest >= 0, here, carried[:, None])
    before = jnp.concatenate([carried[:, None], in_progress[:, :-1]], axis=1)
    start = real & (segment_ids != before)
    return Documents(jnp.cumsum(start, axis=1, dtype=jnp.int32), real, start, in_progress[:, -1])


def document_in_progress(carried: Int[Array, "B"], docs: Documents | None) -> Int[Array, "B"]:
    """The id to carry on; without `segment_ids` every token belongs to the document in progress, or to document 1."""
    return jnp.where(carried == 0, 1, carried) if docs is None else docs.last
