"""What the inner model of TTT-Linear and TTT-MLP is made of, and what their dual form carries."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class InnerLayer(NamedTuple):
    """One layer `x W + b` of every head's inner model: initial weights `[H, I, O]`, in a state `[B, H, I, O]`."""

    kernel: Float[Array, "*B H I O"]
    bias: Float[Array, "*B H O"] | None  # None: `x W`


class InnerNorm(NamedTuple):
    """The LayerNorm at the end of every head's inner model; learned by the outer training only."""

    scale: Float[Array, "H K"]
    bias: Float[Array, "H K"]


class InnerState(NamedTuple):
    """Everything needed to go on from any token, row by row.

    Attributes:
        weights: the inner weights at the start of the mini-batch in progress, `[B, H, ...]`.
        gradients: of the tokens of that mini-batch seen so far, each times its learning rate, summed; like `weights`.
        offset: how many tokens of that mini-batch were seen, `0..M-1`.
        document: id of the document in progress, 0 before the first token (see `tttlm.ops.documents`).
    """

    weights: tuple[InnerLayer, ...]
    gradients: tuple[InnerLayer, ...]
    offset: Int[Array, "B"]
    document: Int[Array, "B"]
