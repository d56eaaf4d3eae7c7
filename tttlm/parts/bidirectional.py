"""Sequence layers that read in more than one order, for what has no past and future, as pictures."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError

Merge = Literal["sum", "concatenate"]


class Bidirectional(nnx.Module):
    """A sequence layer that reads every sequence forward and backward, with the same parameters.

    >>> layer = Bidirectional(TTTLinear(64, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    A reversed sequence gives reversed outputs; of concatenated outputs the halves change places. Positions and
    mini-batches of the second pass count from the last token, so that a document packed among others gives what it
    gives alone where it starts and ends on a mini-batch boundary.

    Args:
        layer: Any layer of `tttlm.layers`.
        merge: "sum", or "concatenate" for `[..., T, 2 D]`.

    Raises:
        InputError: `merge` is neither.
    """

    def __init__(self, layer: nnx.Module, *, merge: Merge = "sum"):
        if merge not in ("sum", "concatenate"):
            raise InputError(f"merge must be 'sum' or 'concatenate', got {merge!r}")
        self.layer, self.merge = layer, merge

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        segment_ids: Int[Array, "*B T"] | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
    ) -> Float[Array, "*B T E"]:
        """The outputs of both passes; arguments are as for the layer, and padding takes no position in either pass.

        Raises:
            InputError: An argument has another shape or dtype.
        """
        forward = self.layer(x, segment_ids, lengths=lengths, mask=mask)
        if lengths is not None:
            mask = jnp.arange(x.shape[-2]) < lengths[..., None]
        flip = lambda a: None if a is None else jnp.flip(a, axis=-1)
        backward = self.layer(jnp.flip(x, axis=-2), flip(segment_ids), mask=flip(mask))
        backward = jnp.flip(backward, axis=-2)
        return forward + backward if self.merge == "sum" else jnp.concatenate([forward, backward], axis=-1)


def scan_image(layer: nnx.Module, image: Float[Array, "*B H W D"]) -> Float[Array, "*B H W E"]:
    """The sum of what `layer` gives for the pixels row by row and column by column, at each pixel.

    The transposed image gives the transposed result. With a `Bidirectional` layer these are the four scans of VMamba
    (arXiv 2401.10166). `layer(image)` itself reads every row as a sequence of its own.
    """

    def rows(image: Float[Array, "*B H W D"]) -> Float[Array, "*B H W E"]:
        *leading, height, width, features = image.shape
        y = layer(image.reshape(*leading, height * width, features))  # type: ignore[operator]
        return y.reshape(*leading, height, width, y.shape[-1])

    return rows(image) + jnp.swapaxes(rows(jnp.swapaxes(image, -3, -2)), -3, -2)
