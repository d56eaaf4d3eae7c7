"""The dual form: all tokens of a mini-batch use its starting weights, so one mini-batch is a few matrix products.

With `x_l`, `z_l` the inputs and pre-activations of layer `l` for the keys, `G_l = dloss/dz_l`, bars for the queries,
`eta_ts = token_scale[t] learning_rates[s]` (paper, appendix A; the bias is one more input that is always 1):

    zbar_l = xbar_l W_l + b_l - (eta o tril(xbar_l x_l^T + 1)) G_l

`eta` has rank one: its key factor goes into `G_l`, its query factor into the causal mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tttlm.ops.documents import Documents, num_positions
from tttlm.ops.ttt.chunks import remat_scan
from tttlm.ops.ttt.model import activation, activation_gradient, layer_norm, loss_gradient
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState

Weights = tuple[InnerLayer, ...]


class Tokens(NamedTuple):
    """The tokens of mini-batches; `m` is `M`, or less if a sequence is shorter than a mini-batch.

    Before they are processed heads are stored next to each other, `[N, B, m, H K]`: heads and tokens of the sequence
    are not transposed, and a TPU, which pads the last axis to 128, pads nothing.
    """

    q: Float[Array, "*N B m HK"]
    k: Float[Array, "*N B m HK"]
    v: Float[Array, "*N B m HK"]
    rate: Float[Array, "*N B m H"]


class MiniBatchDocuments(NamedTuple):
    """The documents in a mini-batch.

    Attributes:
        reset: whether a document starts at the first token.
        document: index of every token's document (see `Documents`); None if no document starts after the first token.
        starts_mid_chunk: whether any sequence has a document that does, or None.
    """

    reset: Bool[Array, "*N B"]
    document: Int[Array, "*N B m"] | None
    starts_mid_chunk: Bool[Array, "*N"] | None


def dual(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    learning_rates: Float[Array, "B T H"],
    token_scale: Float[Array, "M"],
    weights: Weights,
    norm: InnerNorm | None,
    *,
    state: InnerState,
    docs: Documents | None,
    eps: float,
    at_start: bool,
    aligned: bool,
    remat_mini_batches: int,
) -> tuple[Float[Array, "B T H K"], InnerState]:
    """See `tttlm.ops.ttt.learn`; `at_start`: whether every sequence is at the start of a mini-batch."""
    if docs is not None:
        learning_rates = jnp.where(docs.real[..., None], learning_rates, 0)
    inputs = (queries, keys, values, learning_rates)
    arguments = (token_scale, weights, norm, state, docs, eps, aligned, remat_mini_batches)
    if at_start and (docs is None or docs.lengths is None):
        return _from_boundary(*inputs, *arguments)
    return _extend(*inputs, *arguments)


def _from_boundary(queries, keys, values, learning_rates, token_scale, weights, norm, state, docs, eps, aligned, group):
    """From the start of a mini-batch: complete mini-batches in a scan, then the remaining tokens."""
    time, size = queries.shape[1], token_scale.shape[0]
    count, rest = divmod(time, size)
    full = count * size
    current, outputs = state.weights, []
    accumulated = jax.tree.map(jnp.zeros_like, current)
    inputs = (queries, keys, values, learning_rates)
    index = None if docs is None else docs.index

    if count:

        def step(current, xs):
            tokens, docs_here = xs
            out, current, update = _mini_batch(
                current, None, weights, norm, tokens, docs_here, token_scale[None], eps, step=token_scale[-1]
            )
            return jax.tree.map(jnp.subtract, current, update), out.astype(tokens.q.dtype)  # half the memory

        tokens = Tokens(*(_to_mini_batches(a[:, :full], count, size) for a in inputs))
        docs_here = None if index is None else _documents_by_mini_batch(index[:, :full], count, size, aligned)
        current, out = remat_scan(step, current, (tokens, docs_here), group)
        outputs.append(_from_mini_batches(out, queries.shape[2]))
    if rest:
        tokens = Tokens(*(_to_mini_batches(a[:, full:], 1, rest)[0] for a in inputs))
        docs_here = None
        if index is not None:
            before = index[:, full - 1] if count else jnp.zeros_like(index[:, 0])
            docs_here = jax.tree.map(
                lambda a: a[0], _documents_by_mini_batch(index[:, full:], 1, rest, aligned, before)
            )
        out, current, accumulated = _mini_batch(
            current, None, weights, norm, tokens, docs_here, token_scale[None, :rest], eps
        )
        outputs.append(_from_mini_batches(out[None], queries.shape[2]))
    offset = jnp.full_like(state.offset, rest)
    return jnp.concatenate(outputs, axis=1), InnerState(current, accumulated, offset, state.document)


def _extend(queries, keys, values, learning_rates, token_scale, weights, norm, state, docs, eps, aligned, group):
    """From any token, a different one per sequence: sequences are shifted so that their mini-batches are aligned."""
    (batch, time), size = queries.shape[:2], token_scale.shape[0]
    if time == 1:  # one token needs no other slots of its mini-batch
        count, size_here, first, scale = 1, 1, jnp.zeros_like(state.offset), token_scale[state.offset][:, None]
    else:
        count, size_here, first, scale = -(-(time + size - 1) // size), size, state.offset, token_scale[None]

    def shift(a, fill):
        return jax.vmap(lambda row, to, at: jax.lax.dynamic_update_slice_in_dim(to, row, at, 0))(a, fill, first)

    def place(a):
        blank = jnp.zeros((batch, count * size_here, *a.shape[2:]), a.dtype)
        return _to_mini_batches(shift(a, blank), count, size_here)

    tokens = Tokens(*map(place, (queries, keys, values, learning_rates)))
    docs_here = None
    if docs is not None:
        # Slots before the first token have the document carried in (index 0), those after the last the one in progress.
        behind = jnp.arange(count * size_here) >= first[:, None]
        blank = jnp.where(behind, docs.last_index[:, None], 0)
        docs_here = _documents_by_mini_batch(shift(docs.index, blank), count, size_here, aligned)
    ends = (jnp.arange(count, dtype=jnp.int32)[:, None] + 1) * size
    after = state.offset + num_positions(docs, time)
    complete = after >= ends  # [N, B]

    def step(carry, xs):
        tokens, docs_here, complete = xs
        current, accumulated = carry
        out, current, sums = _mini_batch(current, accumulated, weights, norm, tokens, docs_here, scale, eps)
        stepped = jax.tree.map(lambda w, g: w - token_scale[-1] * g, current, sums)
        return (_select(complete, stepped, current), _select(complete, jax.tree.map(jnp.zeros_like, sums), sums)), out

    carry = state.weights, state.gradients
    (current, accumulated), out = remat_scan(step, carry, (tokens, docs_here, complete), group)
    out = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, time))(
        _from_mini_batches(out, queries.shape[2]), first
    )
    return out, InnerState(current, accumulated, after % size, state.document)


def _mini_batch(current, accumulated, weights, norm, tokens, docs_here, scale, eps, step=None):
    """Outputs, the weights that the document in progress started this mini-batch with, and its summed gradients
    (times `step`, where one is given).

    Tokens of a document that starts after the first token learn from and are read out of the initial weights. Such
    mini-batches are rare (packers start documents on a boundary), so their extra cost is in a separate branch.
    """
    causal = jnp.tril(jnp.ones((tokens.q.shape[-2],) * 2, bool))
    tokens = Tokens(*(_by_head(a.astype(scale.dtype), current[0].kernel.shape[1]) for a in tokens))
    if docs_here is None:
        out, sums = _learn(current, accumulated, norm, tokens, causal, None, scale, eps, step)
        return _side_by_side(out), current, sums

    blank = jax.tree.map(jnp.zeros_like, current)
    current = _select(docs_here.reset, weights, current)
    if accumulated is not None:
        accumulated = _select(docs_here.reset, blank, accumulated)
    index = docs_here.document
    if index is None:
        out, sums = _learn(current, accumulated, norm, tokens, causal, None, scale, eps, step)
        return _side_by_side(out), current, sums

    in_new_document, in_last_document = index != index[:, :1], index == index[:, -1:]
    same = causal & (index[:, :, None] == index[:, None, :])
    out, sums = _learn(current, accumulated, norm, tokens, same[:, None], in_last_document, scale, eps, step)

    def with_new_documents():
        initial = jax.tree.map(lambda w, c: jnp.broadcast_to(w, c.shape), weights, current)
        new_out, new_sums = _learn(initial, None, norm, tokens, same[:, None], in_last_document, scale, eps, step)
        mixed = jnp.where(in_new_document[:, None, :, None], new_out, out)
        return mixed, _select(in_new_document[:, -1], initial, current), _select(in_new_document[:, -1], new_sums, sums)

    out, current, sums = jax.lax.cond(docs_here.starts_mid_chunk, with_new_documents, lambda: (out, current, sums))
    return _side_by_side(out), current, sums


def _learn(
    weights: Weights,
    accumulated: Weights | None,
    norm: InnerNorm | None,
    tokens: Tokens,
    visible: Bool[Array, "*B m m"],
    in_last_document: Bool[Array, "B m"] | None,
    scale: Float[Array, "b m"],
    eps: float,
    step: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "B H m K"], Weights]:
    """One mini-batch that starts from `weights`, with the sums `accumulated` of its tokens before these.

    Args:
        weights: at the start of the mini-batch, `[B, H, ...]`.
        accumulated: gradients of earlier tokens of the mini-batch times their rates; None where there are none.
        norm: the norm of the inner model, or None.
        tokens: `[B, H, m, K]`, rates `[B, H, m, 1]`.
        visible: which keys `s` a query `t` learns from.
        in_last_document: the tokens whose gradients are carried; None for all.
        scale: `token_scale` of these tokens, for all sequences or each.
        eps: epsilon of the inner LayerNorm.
        step: factor of the summed gradients, which is multiplied into the gradients of the tokens, which are smaller.

    Returns:
        The outputs, and the summed gradients to carry.
    """
    q, k, v, rate = tokens
    norm = None if norm is None else InnerNorm(norm.scale[:, None, :], norm.bias[:, None, :])  # [H, 1, K]
    # Keys and queries meet the first layer in one product, and so do their gradients.
    z, zbar = jnp.split(_linear(jnp.concatenate([k, q], axis=-2), weights[0]), 2, axis=-2)
    inputs, pre_activations = [k], [z]
    for layer in weights[1:]:
        inputs.append(activation(z))
        z = _linear(inputs[-1], layer)
        pre_activations.append(z)

    # Gradients at the starting weights, from the loss down, each token's times its learning rate.
    g = z - v if norm is None else loss_gradient(z, v - k, norm.scale, norm.bias, eps)
    g = g * rate
    gradients = [g]
    for layer, z in zip(reversed(weights[1:]), reversed(pre_activations[:-1]), strict=True):
        g = (g @ layer.kernel.mT) * activation_gradient(z)
        gradients.append(g)
    gradients.reverse()

    mask = jnp.where(visible, scale[:, None, :, None], 0)  # [B or 1, H or 1, m, m]
    xbar = q
    for i, layer in enumerate(weights):
        if i:
            xbar = activation(zbar)
            zbar = _linear(xbar, layer)
        meeting = xbar @ inputs[i].mT + (0 if layer.bias is None else 1)
        zbar = zbar - (mask * meeting) @ gradients[i]
        if accumulated is not None:
            zbar = zbar - scale[:, None, :, None] * _linear(xbar, accumulated[i])
    out = zbar if norm is None else q + layer_norm(zbar, norm.scale, norm.bias, eps)

    sums = []
    for x, g, layer in zip(inputs, gradients, weights, strict=True):
        if in_last_document is not None:
            g = jnp.where(in_last_document[:, None, :, None], g, 0)
        if step is not None:
            g = step * g
        sums.append(InnerLayer(x.mT @ g, None if layer.bias is None else jnp.sum(g, axis=-2)))
    if accumulated is not None:
        sums = jax.tree.map(jnp.add, tuple(sums), accumulated)
    return out, tuple(sums)


def _linear(x: Float[Array, "B H m I"], layer: InnerLayer) -> Float[Array, "B H m O"]:
    z = x @ layer.kernel
    return z if layer.bias is None else z + layer.bias[..., None, :]


def _documents_by_mini_batch(index, count, size, aligned, before=0) -> MiniBatchDocuments:
    """`index` `[B, N m]` by mini-batch; `before`: the index of the token before the first."""
    batch = index.shape[0]
    index = index.reshape(batch, count, size).swapaxes(0, 1)
    before = jnp.broadcast_to(before, (batch,))[None]
    previous = jnp.concatenate([before, index[:-1, :, -1]])
    reset = index[:, :, 0] != previous
    if aligned or size == 1:
        return MiniBatchDocuments(reset, None, None)
    return MiniBatchDocuments(reset, index, jnp.any(index != index[:, :, :1], axis=(1, 2)))


def _to_mini_batches(a, count, size):
    """`[B, N m, H, ...]` to `[N, B, m, H ...]`."""
    return a.reshape(a.shape[0], count, size, -1).swapaxes(0, 1)


def _by_head(a, heads):
    """`[B, m, H K]` to `[B, H, m, K]`."""
    return a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2)


def _side_by_side(a):
    """`[B, H, m, K]` to `[B, m, H K]`."""
    return a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1)


def _from_mini_batches(a, heads):
    """`[N, B, m, H K]` to `[B, N m, H, K]`."""
    return a.swapaxes(0, 1).reshape(a.shape[1], -1, heads, a.shape[-1] // heads)


def _select(rows, new, old):
    """`new` in those sequences, `old` in the others, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(rows.shape + (1,) * (b.ndim - 1)), a, b), new, old)
