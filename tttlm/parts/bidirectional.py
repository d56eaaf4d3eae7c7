"""Sequence layers that read in more than one order, for what has no past and future, as pictures."""

import inspect
from typing import Any, Literal

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
        positions: Int[Array, "*B T"] | None = None,
        attention_mask: Bool[Array, "*M T T"] | None = None,
        inner_learning_rate_multiplier: float | Float[Array, ""] | None = None,
    ) -> Float[Array, "*B T E"]:
        """The outputs of both passes.

        Arguments are those of the layer, and each is for the tokens as they stand in `x`: a token has the same given
        position in both passes, and may attend to the same keys. Padding takes no position in either pass.

        Raises:
            InputError: An argument has another shape or dtype, or the layer does not take it.
        """
        options: dict[str, Any] = {
            "positions": positions,
            "attention_mask": attention_mask,
            "inner_learning_rate_multiplier": inner_learning_rate_multiplier,
        }
        options = {name: value for name, value in options.items() if value is not None}
        _check_takes(self.layer, options)
        forward = self.layer(x, segment_ids, lengths=lengths, mask=mask, **options)
        if lengths is not None:
            mask = jnp.arange(x.shape[-2]) < jnp.asarray(lengths)[..., None]
        flip = lambda a: None if a is None else jnp.flip(a, axis=-1)
        if positions is not None:
            options["positions"] = flip(positions)
        if attention_mask is not None:
            options["attention_mask"] = jnp.flip(attention_mask, axis=(-2, -1))
        backward = self.layer(jnp.flip(x, axis=-2), flip(segment_ids), mask=flip(mask), **options)
        backward = jnp.flip(backward, axis=-2)
        return forward + backward if self.merge == "sum" else jnp.concatenate([forward, backward], axis=-1)


def scan_image(
    layer: nnx.Module,
    image: Float[Array, "*B H W D"],
    *,
    mask: Bool[Array, "*B H W"] | None = None,
    positions: Int[Array, "*B H W"] | None = None,
    inner_learning_rate_multiplier: float | Float[Array, ""] | None = None,
) -> Float[Array, "*B H W E"]:
    """The sum of what `layer` gives for the pixels row by row and column by column, at each pixel.

    The transposed image gives the transposed result. With a `Bidirectional` layer these are the four scans of VMamba
    (arXiv 2401.10166). `layer(image)` itself reads every row as a sequence of its own.

    Args:
        layer: A layer of `tttlm.layers`, a `Bidirectional` one included.
        image: The images, with any leading dimensions.
        mask: True at pixels, False at padding around images of different sizes, which is neither read nor written and
            does not count as a position. The result at padding is 0.
        positions: Positions by which queries and keys are rotated, the same in both scans; None for those in a scan.
        inner_learning_rate_multiplier: As in a call of the layer; None for 1.

    Raises:
        InputError: An argument has another shape or dtype, or the layer does not take it.
    """
    per_pixel = {name: a for name, a in (("mask", mask), ("positions", positions)) if a is not None}
    for name, a in per_pixel.items():
        if a.shape != image.shape[:-1]:
            raise InputError(f"{name} must have shape {image.shape[:-1]} to go with image {image.shape}, got {a.shape}")
    multiplier = inner_learning_rate_multiplier
    options: dict[str, Any] = {} if multiplier is None else {"inner_learning_rate_multiplier": multiplier}
    _check_takes(layer, per_pixel | options)

    def rows(image: Array, per_pixel: dict[str, Array]) -> Array:
        *leading, height, width, _ = image.shape
        flat = {name: a.reshape(*leading, height * width) for name, a in per_pixel.items()}
        y = layer(image.reshape(*leading, height * width, image.shape[-1]), **flat, **options)  # type: ignore[operator]
        return y.reshape(*leading, height, width, y.shape[-1])

    columns = {name: jnp.swapaxes(a, -2, -1) for name, a in per_pixel.items()}
    return rows(image, per_pixel) + jnp.swapaxes(rows(jnp.swapaxes(image, -3, -2), columns), -3, -2)


def _check_takes(layer: nnx.Module, options: dict[str, Any]) -> None:
    """Refuses keyword arguments that a call of the layer does not have.

    Raises:
        InputError: The layer has no argument of such a name.
    """
    names = inspect.signature(type(layer).__call__).parameters  # type: ignore[operator]
    for name in options.keys() - names.keys():
        raise InputError(f"{name} must be None: {type(layer).__name__} does not take it")
