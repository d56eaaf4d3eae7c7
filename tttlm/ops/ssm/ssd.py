"""The recurrence of Mamba-2, a chunk of tokens at a time: structured state-space duality (arXiv 2405.21060).

Within a chunk the recurrence is a product with a lower-triangular matrix, as in attention, and states exist only
between chunks. One scan runs over chunks, which are recomputed in the backward pass, so that memory holds the matrices
of a single chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tttlm.ops.documents import Documents
from tttlm.ops.ssm.reference import ssd_reference
from tttlm.ops.target import target_platform
from tttlm.ops.varying import varying_like

CPU_CHUNK, DEVICE_CHUNK = 64, 256
UNSEEN = -1e30  # exponent of a decay that is 0: finite, so that it never makes a NaN


def ssd(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    *,
    state: Float[Array, "B H P N"] | None = None,
    docs: Documents | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ`, `y_t = h_t C_t` for every head (arXiv 2405.21060, eq. 1 and 2).

    Decays and states are computed in float32, or in float64 if any argument is float64; products take operands
    of the dtype of `x` and are accumulated in float32.

    Args:
        x: inputs of `H` heads of size `P`.
        dt: step sizes, positive.
        A: decay rate of every head, negative.
        B, C: input and output vectors of `G` groups; head `h` reads group `h // (H / G)`.
        state: `h` before the first token; zeros if None.
        docs: documents of the sequences: each starts from zeros, and padding does not change the state.
        chunk_size: tokens of a chunk; the outputs do not depend on it. None picks by the default backend.
        implementation: "chunked" (the default) or "reference", token by token.

    Returns:
        `y` and `h` after the last token, float32 or float64.

    Raises:
        ValueError: groups do not divide heads, or the implementation is unknown.
    """
    (batch, time, heads, width), (groups, states) = x.shape, B.shape[2:]
    if heads % groups:
        raise ValueError(f"groups must divide the heads; got {heads} heads and {groups} groups")
    product = jnp.result_type(x, B, C)
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    dt = dt.astype(dtype)
    start = None
    if docs is not None:
        dt = jnp.where(docs.real[..., None], dt, 0)  # neither decay nor input at padding
        x = jnp.where(docs.real[..., None, None], x, 0)
        start = docs.start
    state = jnp.zeros((batch, heads, width, states), dtype) if state is None else state.astype(dtype)
    u, log_decay = x * dt[..., None], dt * A.astype(dtype)
    state = varying_like(state, u)
    if implementation == "reference":
        return ssd_reference(u, log_decay, B.astype(dtype), C.astype(dtype), start, state)
    if implementation not in (None, "chunked"):
        raise ValueError(f"ssd implementations are chunked and reference; got {implementation!r}")
    u, B, C = (z.astype(product) for z in (u, B, C))
    return _chunked(u, log_decay, B, C, start, state, ssd_chunk(time, chunk_size))


def ssd_chunk(time: int, chunk_size: int | None) -> int:
    """Tokens of a chunk in a sequence of `time` tokens; None picks a fast size for the target device."""
    return min(time, chunk_size or (CPU_CHUNK if target_platform() == "cpu" else DEVICE_CHUNK))


def _chunked(
    u: Float[Array, "B T H P"],
    log_decay: Float[Array, "B T H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B H P N"],
    chunk: int,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """Computes chunk by chunk; the last one is padded with tokens that neither decay nor add."""
    (batch, time, heads, width), groups = u.shape, B.shape[2]
    dtype, repeats = state.dtype, heads // groups

    def split(z: Array) -> Array:  # [B, T, X] -> [chunks, B, X, tokens], where the products want no transposition
        z = jnp.pad(z, ((0, 0), (0, -time % chunk)) + ((0, 0),) * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(batch, -1, chunk, *z.shape[2:]), (1, 2), (0, -1))

    def tokens_before_states(z: Array) -> Array:
        return jnp.swapaxes(split(z), -1, -2)  # [chunks, B, G, L, N]

    u = split(u.reshape(batch, time, groups, repeats, width))
    log_decay = split(log_decay.reshape(batch, time, groups, repeats))
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    @jax.checkpoint
    def step(h: Array, inputs: tuple) -> tuple[Array, Array]:
        u, log_decay, b, c, start = inputs  # [B G R P L], [B G R L], [B G L N] twice, [B L]
        if start is None:
            seen, total = causal, jnp.cumsum(log_decay, axis=-1)
        else:
            document = jnp.cumsum(start, axis=-1)[:, None, None]
            seen = causal & (document[..., :, None] == document[..., None, :])
            # Summed within each document, so that not even a rounding error of another one gets in.
            within = seen[:, 0, 0].astype(dtype)
            total = jnp.einsum("bls,bgrs->bgrl", within, log_decay, precision=jax.lax.Precision.HIGHEST)
        between = total[..., :, None] - total[..., None, :]  # from token s to token l
        carried, kept = total, total[..., -1:] - total  # from before the chunk, and to the end of it
        if start is not None:
            carried = jnp.where(document == 0, carried, UNSEEN)
            kept = jnp.where(document == document[..., -1:], kept, UNSEEN)
        scores = jnp.einsum("bgln,bgsn->bgls", c, b, preferred_element_type=dtype)
        mixing = jnp.exp(jnp.where(seen, between, UNSEEN)) * scores[:, :, None]
        y = jnp.einsum("bgrps,bgrls->bgrpl", u, mixing.astype(u.dtype), preferred_element_type=dtype)
        from_before = jnp.einsum("bgrpn,bgln->bgrpl", h.astype(c.dtype), c, preferred_element_type=dtype)
        y = y + from_before * jnp.exp(carried)[..., None, :]
        added = (u * jnp.exp(kept)[..., None, :]).astype(u.dtype)
        added = jnp.einsum("bgrps,bgsn->bgrpn", added, b, preferred_element_type=dtype)
        return h * jnp.exp(carried[..., -1])[..., None, None] + added, y

    inputs = (u, log_decay, tokens_before_states(B), tokens_before_states(C), None if start is None else split(start))
    h, y = jax.lax.scan(step, state.reshape(batch, groups, repeats, width, -1), inputs)
    y = jnp.moveaxis(y, (0, -1), (1, 2)).reshape(batch, -1, heads, width)[:, :time]
    return y, h.reshape(state.shape)
