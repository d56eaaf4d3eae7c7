"""The public function: checks what comes in, reads the documents, and picks an implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.ops.documents import SegmentIds, document_in_progress, documents
from tttlm.ops.ttt.dual import dual
from tttlm.ops.ttt.reference import reference
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState, init_inner_state
from tttlm.ops.varying import varying_like

IMPLEMENTATIONS: dict[str, Callable] = {"dual": dual, "reference": reference}


def ttt_scan(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    learning_rates: Float[Array, "B T H"],
    token_scale: Float[Array, "M"],
    weights: tuple[InnerLayer, ...],
    norm: InnerNorm | None,
    *,
    state: InnerState | None = None,
    segment_ids: SegmentIds = None,
    eps: float = 1e-6,
    remat_mini_batches: int = 1,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H K"], InnerState]:
    """Trains every head's inner model on the tokens as they come, and reads it out at each of them.

    With `W` the inner weights at the start of a mini-batch of `M` tokens, `l(W; k, v) = |k + LN(f(k; W)) - v|^2 / 2`,
    and `t` the place of a token within its mini-batch (arXiv 2407.04620, eq. 4 to 7 and section 2.7):

        W_t = W - token_scale[t] * sum_{s <= t} learning_rates[s] * grad l(W; k_s, v_s)
        output_t = q_t + LN(f(q_t; W_t))

    and the next mini-batch starts from `W_{M-1}`. `f` is an MLP with one layer for every entry of `weights`: one is
    TTT-Linear, two are TTT-MLP. All is computed in float32, or in float64 when anything that comes in is.

    Args:
        queries, keys, values: `q`, `k`, `v` of every token and head.
        learning_rates: inner learning rate of every token as a key.
        token_scale: factor by which the place `t` scales the step, `[M]`; its size is the mini-batch size.
        weights: initial weights of the inner model's layers, kernels `[H, I, O]` and biases `[H, O]` or None; the
            first layer's input and the last one's output are `K` wide. New documents start from them.
        norm: scale and bias of the inner LayerNorm. None for an inner model without it and without the residual
            around it: `l = |f(k; W) - v|^2 / 2`, `output_t = f(q_t; W_t)`. With one layer, no bias, initial weights of
            zero, rates and scales of one and `M >= T`, this is linear attention without a normaliser (theorem 1).
        state: to go on from; None starts from `weights`, in the first place of a mini-batch.
        segment_ids: documents of a row, 0 for padding (see `tttlm.ops.documents`). Mini-batches are counted from
            the start of the row whatever the documents are.
        eps: of the inner LayerNorm.
        remat_mini_batches: the dual form keeps the inner weights before every so many mini-batches for the backward
            pass, and computes those in between again. More than 1 saves memory, which they need most of: `K / M` floats
            a token and channel for TTT-Linear, `8 K / M` for TTT-MLP.
        implementation: "dual" (matrix products over a mini-batch) or "reference" (the definition); None picks.

    Returns:
        outputs `[B, T, H, K]` in the dtype of `queries`, and the state after the last token.

    Raises:
        ValueError: when the implementation is unknown or the shapes do not fit together.
    """
    _check(queries, keys, values, learning_rates, weights, norm)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {sorted(IMPLEMENTATIONS)} or None, got {implementation!r}")
    if remat_mini_batches < 1:
        raise ValueError(f"remat_mini_batches must be at least 1, got {remat_mini_batches}")
    compute = IMPLEMENTATIONS[implementation or "dual"]

    tokens, model = (queries, keys, values), (learning_rates, token_scale, weights, norm)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((tokens, model)))
    model = jax.tree.map(lambda a: a.astype(dtype), model)  # tokens wait in their own, smaller dtype for their turn
    model = varying_like(model, queries)
    carried = init_inner_state(model[2], queries.shape[0]) if state is None else varying_like(state, queries)
    docs = documents(segment_ids, carried.document)
    # Without a state every row stands at the start of a mini-batch, which the fast form makes use of.
    fast = {"known_start": state is None, "remat_mini_batches": remat_mini_batches} if compute is dual else {}
    outputs, after = compute(*tokens, *model, state=carried, docs=docs, eps=eps, **fast)
    return outputs.astype(queries.dtype), after._replace(document=document_in_progress(carried.document, docs))


def _check(queries, keys, values, learning_rates, weights, norm) -> None:
    batch, time, heads, width = queries.shape
    if not weights:
        raise ValueError("the inner model needs at least one layer, got none")
    expected = {
        "keys": (keys.shape, queries.shape),
        "values": (values.shape, queries.shape),
        "learning_rates": (learning_rates.shape, (batch, time, heads)),
    }
    if norm is not None:
        expected |= {f"norm.{name}": (a.shape, (heads, width)) for name, a in norm._asdict().items()}
    inputs = width
    for i, (kernel, bias) in enumerate(weights):
        outputs = width if i == len(weights) - 1 else kernel.shape[-1]
        expected[f"weights[{i}].kernel"] = (kernel.shape, (heads, inputs, outputs))
        if bias is not None:
            expected[f"weights[{i}].bias"] = (bias.shape, (heads, outputs))
        inputs = outputs
    for name, (came, needed) in expected.items():
        if came != needed:
            raise ValueError(f"{name} must have shape {needed} to go with queries {queries.shape}, got {came}")
