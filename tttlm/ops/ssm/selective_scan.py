"""The selective scan of Mamba (arXiv 2312.00752), in chunks.

A token's states take `N` times the memory of its inputs, so they exist for one chunk of tokens at a time: the forward
pass stores only the states between chunks, from which the backward pass recomputes those of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tttlm.ops.documents import Documents
from tttlm.ops.ssm.reference import selective_scan_reference
from tttlm.ops.target import target_platform
from tttlm.ops.varying import varying_like

# Measured at 1536 channels, 16 states, 2048 tokens on two CPU cores: chunks of 16 fit in the cache. Devices with a high
# cost per loop iteration need longer ones.
CPU_CHUNK, DEVICE_CHUNK = 16, 64


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    state: Float[Array, "B N E"] | None = None,
    docs: Documents | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B N E"]]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = C_t h_t`, with `N` states for every channel.

    These are eq. 2 of arXiv 2312.00752 with the discretisation of its released code: exact for `A`, Euler for `B`.

    Args:
        x: inputs of `E` channels.
        dt: step sizes, positive.
        A: decay rates, negative.
        B, C: input and output vectors, common to all channels.
        state: `h` before the first token; zeros if None.
        docs: documents of the sequences: each starts from zeros, and padding does not change the state.
        chunk_size: number of tokens whose states are in memory at a time; None picks by the default backend.
        implementation: "chunked" (the default) or "reference", token by token.

    Returns:
        `y` and `h` after the last token, in float32, or in float64 if any argument is float64.

    Raises:
        ValueError: the implementation is unknown.
    """
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    x, dt, A, B, C = (z.astype(dtype) for z in (x, dt, A, B, C))
    batch, time, channels = x.shape
    if state is None:
        state = jnp.zeros((batch, A.shape[1], channels), dtype)
    start = None
    if docs is not None:
        x, dt = (jnp.where(docs.real[..., None], z, 0) for z in (x, dt))  # neither decay nor input at padding
        start = docs.start
    u = dt * x
    A, state = varying_like((A, state.astype(dtype)), u)
    inputs = (u, dt, A, B, C, start, state)
    if implementation == "reference":
        return selective_scan_reference(*inputs)
    if implementation not in (None, "chunked"):
        raise ValueError(f"selective_scan implementations are chunked and reference; got {implementation!r}")
    on_cpu = target_platform() == "cpu"
    return _chunked(*inputs, min(time, chunk_size or (CPU_CHUNK if on_cpu else DEVICE_CHUNK)), on_cpu)


def _chunked(
    u: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B N E"],
    chunk: int,
    sequential: bool,
) -> tuple[Float[Array, "B T E"], Float[Array, "B N E"]]:
    """Computes chunk by chunk; the last one is padded with tokens that neither decay nor add."""
    (batch, time), channels = u.shape[:2], A.shape[0]

    def split(z: Array) -> Array:  # [B, T, X] -> [chunks, tokens, B, X]
        z = jnp.pad(z, ((0, 0), (0, -time % chunk)) + ((0, 0),) * (z.ndim - 2))
        return jnp.swapaxes(z, 0, 1).reshape(-1, chunk, *z.shape[:1], *z.shape[2:])

    u, dt, B, C = (split(z) for z in (u, dt, B, C))
    step = jax.checkpoint(partial(_in_sequence if sequential else _in_parallel, A.T), prevent_cse=False)
    state, y = jax.lax.scan(step, state, (u, dt, B, C, None if start is None else split(start)))
    return jnp.swapaxes(y.reshape(-1, batch, channels)[:time], 0, 1), state


def _in_sequence(A: Float[Array, "N E"], h: Float[Array, "B N E"], inputs: tuple) -> tuple[Array, Array]:
    """A chunk token by token: each state is touched once, which a CPU wants, and so it is on the way back.

    Vectors become matrices by products, whose transposes XLA computes far faster than sums over states.
    """
    ones = jnp.ones(A.shape[0], A.dtype)

    def token(h: Array, inputs: tuple) -> tuple[Array, Array]:
        u, dt, b, c, start = inputs
        decay = jnp.exp(jnp.einsum("be,n->bne", dt, ones) * A)
        if start is not None:
            decay = jnp.where(start[:, None, None], 0, decay)
        h = decay * h + jnp.einsum("bn,be->bne", b, u)
        return h, jnp.einsum("bn,bne->be", c, h)

    return jax.lax.scan(token, h, inputs)


def _in_parallel(A: Float[Array, "N E"], h: Float[Array, "B N E"], inputs: tuple) -> tuple[Array, Array]:
    """A chunk in log2(L) parallel steps."""
    u, dt, b, c, start = inputs
    decay = jnp.exp(dt[:, :, None] * A)
    if start is not None:
        decay = jnp.where(start[:, :, None, None], 0, decay)
    added = jnp.einsum("lbn,lbe->lbne", b, u).at[0].add(decay[0] * h)
    combine = lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1])
    states = jax.lax.associative_scan(combine, (decay, added))[1]
    return states[-1], jnp.einsum("lbn,lbne->lbe", c, states)
