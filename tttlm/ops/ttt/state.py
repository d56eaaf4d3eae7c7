"""The inner model of TTT-Linear and TTT-MLP, and the state of their dual form."""

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
    """The state from which a sequence can be continued at any token.

    Attributes:
        weights: the inner weights at the start of the mini-batch in progress, `[B, H, ...]`.
        gradients: the sum of the gradients of that mini-batch so far, each times its learning rate; shaped like
            `weights`.
        offset: the number of tokens of that mini-batch so far, `0..M-1`.
        document: id of the document in progress, 0 before the first token (see `tttlm.ops.documents`).
    """

    weights: tuple[InnerLayer, ...]
    gradients: tuple[InnerLayer, ...]
    offset: Int[Array, "B"]
    document: Int[Array, "B"]
