"""Causal depthwise convolution along time.

Written as a few shifted multiply-adds: XLA fuses them, where a grouped convolution runs many times slower on CPU.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.ops.documents import Documents


def causal_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, "C"] | None = None,
    *,
    tail: Float[Array, "B P C"] | None = None,
    docs: Documents | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
    """`y_t = bias + sum_w kernel[W-1-w] x_{t-w}`, every channel by itself, never across documents.

    Args:
        x: inputs.
        kernel: taps, the last one for the present token.
        bias: added to every output.
        tail: the `P = W - 1` inputs before `x` of the document in progress; zeros when None.
        docs: the documents in `x`; None when it is all one document.

    Returns:
        the outputs, and the tail to carry on (zero where it is not of the document in progress).
    """
    (batch, time, channels), width = x.shape, kernel.shape[0]
    if tail is None:
        tail = jnp.zeros((batch, width - 1, channels), x.dtype)
    if docs is not None:
        x = jnp.where(docs.real[..., None], x, 0)
        index = jnp.pad(docs.index, ((0, 0), (width - 1, 0)))
    padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    y = kernel[-1] * x
    for w in range(1, width):
        first = width - 1 - w
        past = padded[:, first : first + time]
        if docs is not None:
            same = index[:, first : first + time] == docs.index
            past = jnp.where(same[..., None], past, 0)
        y = y + kernel[first] * past
    if bias is not None:
        y = y + bias
    tail = padded[:, time:]
    if docs is not None:
        tail = jnp.where((index[:, time:] == docs.last_index[:, None])[..., None], tail, 0)
    return y, tail
