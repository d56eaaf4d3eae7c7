"""Attention one block of keys at a time: memory grows with T, also in the backward pass. For CPU, and without a kernel.

The softmax is accumulated over blocks of keys (arXiv 1805.02867) and the derivatives compute the scores again from the
logarithm of each query's normaliser (arXiv 2307.08691). Blocks of keys that no query of a block can see are never
computed: those in the future, outside the window, or of other documents.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tttlm.ops.attention.mask import visible
from tttlm.ops.linear_map import linear_map
from tttlm.ops.target import target_platform
from tttlm.ops.varying import varying_like

MASKED = -1e30  # a masked score: finite, so that it never makes a NaN, in the backward pass either
FLOOR = -1e29  # where running maxima start: exp(MASKED - FLOOR) is 0, so a query without keys gives 0
# The largest block, and the largest number of scores in memory at a time. Measured: smaller blocks waste the matrix
# products of a CPU, larger ones its cache; a GPU waits for every block.
LIMITS, LIMITS_OF_GPU = (256, 2**24), (1024, 2**26)


class _Side(NamedTuple):
    """Positions and segments of queries or keys, in blocks."""

    positions: Int[Array, "N B Q"]
    segments: Int[Array, "N B Q"]


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    sliding_window: int | None,
    block: int | None = None,
) -> Float[Array, "B T H K"]:
    """See `tttlm.ops.attention.attention`; `block` is the number of queries, and of keys, in a block."""
    k, v = varying_like((k, v), q)
    batch, time, num_heads, head_dim = q.shape
    groups = k.shape[2]
    if block is None:
        block, most = LIMITS_OF_GPU if target_platform() == "gpu" else LIMITS
        while block > 128 and batch * num_heads * block**2 > most:
            block //= 2
    query_block, key_block = min(block, time), min(block, k.shape[1])
    lowest = jnp.iinfo(jnp.int32).min  # padding of the last block has segments of its own
    queries = _side(query_positions, query_segments, query_block, lowest)
    keys = _side(key_positions, key_segments, key_block, lowest + 1)
    grouped = q.reshape(batch, time, groups, num_heads // groups, head_dim)
    q_blocks = jnp.transpose(_split(grouped, query_block), (1, 0, 3, 4, 2, 5))  # [N, B, G, R, Q, K]
    k, v = (_padded(a, key_block) for a in (k, v))
    out, _ = _attend(q_blocks, k, v, queries, keys, sliding_window)
    return jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(batch, -1, num_heads, head_dim)[:, :time]


def _padded(x: Array, block: int) -> Array:
    """Zeros up to complete blocks."""
    short = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))


def _split(x: Array, block: int) -> Array:
    """`[B, T, ...]` -> `[B, N, block, ...]`, the last block padded with zeros."""
    return _padded(x, block).reshape(x.shape[0], -1, block, *x.shape[2:])


def _key_blocks(k: Float[Array, "B MS G K"], keys: _Side) -> Float[Array, "M B G S K"]:
    return jnp.transpose(_split(k, keys.positions.shape[2]), (1, 0, 3, 2, 4))


def _side(positions: Int[Array, "#B T"], segments: Int[Array, "B T"] | None, block: int, filling: int) -> _Side:
    if segments is None:
        segments = jnp.zeros_like(positions)
    short = ((0, 0), (0, -positions.shape[1] % block))
    positions = jnp.pad(positions, short, mode="edge")
    segments = jnp.pad(segments, short, constant_values=filling)
    return _Side(
        *(jnp.swapaxes(x.reshape(x.shape[0], -1, block), 0, 1) for x in (positions, segments)),
    )


def _needed(queries: _Side, keys: _Side, sliding_window: int | None) -> Bool[Array, "N M"]:
    """False where no query of block n can attend to a key of block m in any sequence."""
    first_query, last_query = (f(queries.positions, axis=2)[:, None] for f in (jnp.min, jnp.max))
    first_key, last_key = (f(keys.positions, axis=2)[None] for f in (jnp.min, jnp.max))
    needed = first_key <= last_query
    if sliding_window is not None:
        needed &= last_key > first_query - sliding_window
    needed &= jnp.max(keys.segments, axis=2)[None] >= jnp.min(queries.segments, axis=2)[:, None]
    needed &= jnp.min(keys.segments, axis=2)[None] <= jnp.max(queries.segments, axis=2)[:, None]
    return jnp.any(needed, axis=2)


def _range(needed: Bool[Array, "N M"]) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """For each n, the first m that is needed, and one past the last."""
    first = jnp.argmax(needed, axis=1).astype(jnp.int32)
    last = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=1).astype(jnp.int32)
    return first, jnp.where(jnp.any(needed, axis=1), last, first)


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "N B G R Q K"],
    k: Float[Array, "B MS G K"],
    v: Float[Array, "B MS G K"],
    queries: _Side,
    keys: _Side,
    sliding_window: int | None,
) -> tuple[Float[Array, "N B G R Q K"], Float[Array, "N B G R Q"]]:
    """The outputs, and the logarithm of every query's normaliser.

    Blocks of keys are taken from where they are: in a cache few may be needed, and all of it would be copied.
    """
    dtype, size = jnp.promote_types(q.dtype, jnp.float32), keys.positions.shape[2]
    scale = 1 / math.sqrt(q.shape[-1])

    def query_block(block: tuple[Array, _Side, Array, Array]) -> tuple[Array, Array]:
        q_i, queries_i, first, last = block

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = carry
            k_j, v_j = (jax.lax.dynamic_slice_in_dim(a, j * size, size, axis=1) for a in (k, v))
            scores = jnp.einsum("bgrqk,bsgk->bgrqs", q_i, k_j, preferred_element_type=dtype) * scale
            seen = visible(queries_i.positions, keys.positions[j], queries_i.segments, keys.segments[j], sliding_window)
            scores = jnp.where(seen[:, None, None], scores, MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1)
            seen_values = jnp.einsum("bgrqs,bsgk->bgrqk", weights.astype(v.dtype), v_j, preferred_element_type=dtype)
            return out * shrink[..., None] + seen_values, new_top, total

        start = (
            jnp.zeros(q_i.shape, dtype),
            jnp.full(q_i.shape[:-1], FLOOR, dtype),
            jnp.zeros(q_i.shape[:-1], dtype),
        )
        out, top, total = jax.lax.fori_loop(first, last, key_block, varying_like(start, q_i))
        total = jnp.where(total == 0, 1, total)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    first, last = _range(_needed(queries, keys, sliding_window))
    return jax.lax.map(query_block, (q, queries, first, last))


@_attend.defjvp
def _attend_jvp(sliding_window: int | None, primals: tuple, tangents: tuple) -> tuple:
    out = _attend(*primals, sliding_window)
    map_, transpose = (partial(f, sliding_window) for f in (_tangents, _cotangents))
    return out, linear_map(map_, transpose, (*primals, *out), tangents[:3])


def _tangents(sliding_window: int | None, primals: tuple, tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """`dout = sum_j w_j (ds_j v_j + dv_j) - out dlog_total`, `dlog_total = sum_j w_j ds_j` of weights `w`, scores `s`.

    It is made of differentiable parts, so that any order follows.
    """
    q, k, v, queries, keys, out, log_total = primals
    dq, dk, dv = tangents
    k, v, dk, dv = (_key_blocks(a, keys) for a in (k, v, dk, dv))
    dtype, scale = log_total.dtype, 1 / math.sqrt(q.shape[-1])

    def query_block(block: tuple) -> tuple[Array, Array]:
        q_i, dq_i, queries_i, log_total_i, needed = block

        @partial(jax.checkpoint, prevent_cse=False)
        def key_block(carry: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], None]:
            k_j, dk_j, v_j, dv_j, keys_j, needed = block

            def add() -> tuple[Array, Array]:
                d_out, d_log_total = carry
                product = partial(jnp.einsum, preferred_element_type=dtype)
                seen = visible(
                    queries_i.positions, keys_j.positions, queries_i.segments, keys_j.segments, sliding_window
                )
                scores = jnp.where(seen[:, None, None], product("bgrqk,bgsk->bgrqs", q_i, k_j) * scale, MASKED)
                weights = jnp.exp(scores - log_total_i[..., None])
                d_scores = product("bgrqk,bgsk->bgrqs", dq_i, k_j) + product("bgrqk,bgsk->bgrqs", q_i, dk_j)
                change = weights * (d_scores * scale)
                d_out = d_out + product("bgrqs,bgsk->bgrqk", change.astype(v.dtype), v_j)
                d_out = d_out + product("bgrqs,bgsk->bgrqk", weights.astype(v.dtype), dv_j)
                return d_out, d_log_total + jnp.sum(change, axis=-1)

            return jax.lax.cond(needed, add, lambda: carry), None

        start = (jnp.zeros(q_i.shape, dtype), jnp.zeros(q_i.shape[:-1], dtype))
        return jax.lax.scan(key_block, varying_like(start, q_i), (k, dk, v, dv, keys, needed))[0]

    d_out, d_log_total = jax.lax.map(query_block, (q, dq, queries, log_total, _needed(queries, keys, sliding_window)))
    d_out = d_out - out.astype(dtype) * d_log_total[..., None]
    return d_out.astype(out.dtype), d_log_total


def _cotangents(
    sliding_window: int | None, primals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """The transpose of `_tangents` (the backward pass of arXiv 2307.08691)."""
    q, k, v, queries, keys, out, log_total = primals
    d_out, d_log_total = cotangents
    k, v = (_key_blocks(a, keys) for a in (k, v))
    dtype, scale = log_total.dtype, 1 / math.sqrt(q.shape[-1])
    # the sum over keys of weight times its gradient, which the softmax subtracts
    mean = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1) - d_log_total

    def key_block(d_q: Array, block: tuple[Array, Array, _Side, Array, Array]) -> tuple[Array, tuple]:
        k_j, v_j, keys_j, first, last = block

        # keys before queries: then all products but that of d_q are of plain row-major operands
        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            scores = jnp.einsum("bgsk,bgrqk->bgsrq", k_j, q[i], preferred_element_type=dtype) * scale
            seen = visible(queries.positions[i], keys_j.positions, queries.segments[i], keys_j.segments, sliding_window)
            scores = jnp.where(jnp.swapaxes(seen, 1, 2)[:, None, :, None], scores, MASKED)
            weights = jnp.exp(scores - log_total[i][:, :, None])
            d_v += jnp.einsum("bgsrq,bgrqk->bgsk", weights.astype(v.dtype), d_out[i], preferred_element_type=dtype)
            d_weights = jnp.einsum("bgsk,bgrqk->bgsrq", v_j, d_out[i], preferred_element_type=dtype)
            d_scores = (weights * (d_weights - mean[i][:, :, None]) * scale).astype(q.dtype)
            d_k += jnp.einsum("bgsrq,bgrqk->bgsk", d_scores, q[i], preferred_element_type=dtype)
            d_q_i = jnp.einsum("bgsrq,bgsk->bgrqk", d_scores, k_j, preferred_element_type=dtype)
            return jax.lax.dynamic_update_index_in_dim(d_q, d_q[i] + d_q_i, i, 0), d_k, d_v

        start = (d_q, *varying_like((jnp.zeros(k_j.shape, dtype), jnp.zeros(v_j.shape, dtype)), q))
        d_q, d_k, d_v = jax.lax.fori_loop(first, last, query_block, start)
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    first, last = _range(_needed(queries, keys, sliding_window).T)
    d_q, of_keys = jax.lax.scan(key_block, varying_like(jnp.zeros(q.shape, dtype), q), (k, v, keys, first, last))
    d_k, d_v = (jnp.transpose(a, (1, 0, 3, 2, 4)).reshape(primals[1].shape) for a in of_keys)
    return d_q.astype(q.dtype), d_k, d_v
