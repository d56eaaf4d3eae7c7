"""Padding that does not count as a position: sequences of different lengths in one batch, independent of each other."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from tttlm.errors import InputError
from tttlm.ops.documents import Documents, SegmentIds, documents


class Padding(NamedTuple):
    """The tokens of a batch, and the permutation that moves them to the front of their sequences.

    Attributes:
        mask: True at tokens.
        lengths: Number of tokens of each sequence.
        order: The positions of the tokens, then those of the padding; None if the tokens are in front already.
    """

    mask: Bool[Array, "B T"]
    lengths: Int[Array, "B"]
    order: Int[Array, "B T"] | None

    def to_front(self, x: Shaped[Array, "B T *S"]) -> Shaped[Array, "B T *S"]:
        """`x` with the tokens in front, and 0 after them."""
        if self.order is not None:
            x = jnp.take_along_axis(x, self.order.reshape(self.order.shape + (1,) * (x.ndim - 2)), axis=1)
        in_front = jnp.arange(x.shape[1]) < self.lengths[:, None]
        return jnp.where(in_front.reshape(in_front.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    def documents(self, segment_ids: Int[Array, "B T"] | None, carried: Int[Array, "B"] | None) -> Documents:
        """The documents of the tokens after moving them; without ids, the one in progress, or document 1."""
        if segment_ids is None:
            one = jnp.ones_like(self.lengths) if carried is None else jnp.where(carried == 0, 1, carried)
            segment_ids = jnp.broadcast_to(one[:, None], self.mask.shape)
            in_front = jnp.arange(self.mask.shape[1]) < self.lengths[:, None]
            docs = documents(jnp.where(in_front, segment_ids, 0), carried, self.lengths)
        else:
            docs = documents(self.to_front(segment_ids), carried, self.lengths)
        assert docs is not None
        return docs

    def back(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`y` with the tokens at their original positions, and 0 at padding."""
        if self.order is not None:
            y = jnp.take_along_axis(y, jnp.maximum(jnp.cumsum(self.mask, axis=1) - 1, 0)[..., None], axis=1)
        return jnp.where(self.mask[..., None], y, 0)


def padding(shape: tuple[int, ...], lengths: Array | None, mask: Array | None) -> Padding | None:
    """Reads `lengths` `[B]` or `mask` `[B, T]`, True at tokens, of a batch of that shape; None if neither is given.

    Raises:
        InputError: both are given, or one has a wrong shape or dtype.
    """
    if lengths is not None and mask is not None:
        raise InputError("lengths and mask say the same: give one of them, got both")
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        if lengths.shape != shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise InputError(f"lengths must be {shape[0]} integers, got {lengths.dtype} {lengths.shape}")
        lengths = jnp.clip(lengths, 0, shape[1]).astype(jnp.int32)
        return Padding(jnp.arange(shape[1]) < lengths[:, None], lengths, None)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != shape or mask.dtype != jnp.bool_:
            raise InputError(f"mask must be booleans of shape {shape}, True at tokens; got {mask.dtype} {mask.shape}")
        order = jnp.argsort(~mask, axis=1, stable=True)
        return Padding(mask, jnp.sum(mask, axis=1, dtype=jnp.int32), order)
    return None


def read_sequences(
    x: Float[Array, "B T D"],
    segment_ids: SegmentIds,
    carried: Int[Array, "B"] | None,
    lengths: Array | None,
    mask: Array | None,
) -> tuple[Float[Array, "B T D"], Documents | None, Callable[[Array], Array], Callable[[Array], Array]]:
    """Moves tokens to the front, numbers documents and sets padding to zero, before a layer computes.

    Args:
        x: The input of the layer.
        segment_ids: As in a call of the layer.
        carried: The documents in progress of the state; None without a state.
        lengths: As in `padding`.
        mask: As in `padding`.

    Returns:
        The input; its documents, None if it is one document; a function that moves other arrays `[B, T, ...]` like the
        input; and a function that restores the order of the output.

    Raises:
        InputError: lengths or mask have wrong shapes.
    """
    given = padding(x.shape[:2], lengths, mask)
    if given is None:
        docs = documents(segment_ids, carried)
        if docs is not None and docs is not segment_ids:  # the caller that read the documents has zeroed the padding
            x = jnp.where(docs.real[..., None], x, 0)
        return x, docs, lambda a: a, lambda y: y
    if isinstance(segment_ids, Documents):
        raise InputError("segment_ids that are `Documents` contain the padding already: lengths and mask must be None")
    return given.to_front(x), given.documents(segment_ids, carried), given.to_front, given.back
