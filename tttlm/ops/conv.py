"""Causal depthwise convolution along time.

It is written as a few shifted multiply-adds, which XLA fuses; a grouped convolution is many times slower on CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from tttlm.ops.documents import Documents
from tttlm.ops.linear_map import linear_map
from tttlm.ops.varying import varying_like


def causal_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, "C"] | None = None,
    *,
    tail: Float[Array, "B P C"] | None = None,
    docs: Documents | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
    """`y_t = bias + sum_w kernel[W-1-w] x_{t-w}`, for every channel separately, never across documents.

    Args:
        x: inputs.
        kernel: taps, the last one for the current token.
        bias: bias of every output.
        tail: the `P = W - 1` inputs before `x` of the document in progress; zeros if None.
        docs: the documents in `x`; None if it is one document.

    Returns:
        The outputs, and the next tail (zero where it is not of the document in progress).
    """
    (batch, time, channels), width = x.shape, kernel.shape[0]
    if tail is None:
        tail = jnp.zeros((batch, width - 1, channels), x.dtype)
    if docs is not None:
        x = jnp.where(docs.real[..., None], x, 0)
        index = jnp.pad(docs.index, ((0, 0), (width - 1, 0)))
    padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    same = None
    if docs is not None:
        same = jnp.stack([index[:, w : w + time] == docs.index for w in range(width)])
    y = _shifted_sum(padded, varying_like(kernel, padded), same)
    if bias is not None:
        y = y + bias
    last: slice | Array = slice(time, None)
    if docs is not None and docs.lengths is not None:
        last = docs.lengths[:, None] + jnp.arange(width - 1)
    tail = _at(padded, last)
    if docs is not None:
        tail = jnp.where((_at(index, last) == docs.last_index[:, None])[..., None], tail, 0)
    return y, tail


def _at(a: Shaped[Array, "B P *S"], positions: slice | Int[Array, "B Q"]) -> Shaped[Array, "B Q *S"]:
    """`a` at those positions, in every sequence or in each."""
    if isinstance(positions, slice):
        return a[:, positions]
    return jnp.take_along_axis(a, positions.reshape(positions.shape + (1,) * (a.ndim - 2)), axis=1)


@jax.custom_jvp
def _shifted_sum(
    padded: Float[Array, "B TP C"], kernel: Float[Array, "W C"], same: Bool[Array, "W B T"] | None
) -> Float[Array, "B T C"]:
    """`sum_w kernel[w] padded[t + w]` over the taps of the same document."""
    time = padded.shape[1] - kernel.shape[0] + 1
    return sum(tap * _kept(padded[:, w : w + time], same, w) for w, tap in enumerate(kernel))


@_shifted_sum.defjvp
def _shifted_sum_jvp(primals, tangents):
    return _shifted_sum(*primals), linear_map(_tangent, _cotangents, primals, tangents[:2])


def _tangent(primals, tangents):
    padded, kernel, same = primals
    return _shifted_sum(tangents[0], kernel, same) + _shifted_sum(padded, tangents[1], same)


def _cotangents(primals, dy):
    """Derived from the slices it is a sum of padded arrays, which XLA computes anew for every product that reads it."""
    padded, kernel, same = primals
    (width, _), time = kernel.shape, dy.shape[1]
    for_padded, for_kernel = jnp.zeros_like(padded), []
    wide = jnp.pad(dy, ((0, 0), (width - 1, width - 1), (0, 0)))
    for w, tap in enumerate(kernel):
        if same is not None:
            wide = jnp.pad(_kept(dy, same, w), ((0, 0), (width - 1, width - 1), (0, 0)))
        first = width - 1 - w
        for_padded = for_padded + tap * wide[:, first : first + padded.shape[1]]
        for_kernel.append(jnp.sum(_kept(dy, same, w) * padded[:, w : w + time], axis=(0, 1)))
    return for_padded, jnp.stack(for_kernel)


def _kept(a, same, w):
    """`a` where the tap `w` is of the same document."""
    return a if same is None else jnp.where(same[w][..., None], a, 0)
