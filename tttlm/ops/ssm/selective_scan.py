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
    y, state = _scan(u, dt, A.T, B, C, None if start is None else split(start), state, sequential)
    return jnp.swapaxes(y.reshape(-1, batch, channels)[:time], 0, 1), state


def _recurrence(
    a: Float[Array, "L B N E"], b: Float[Array, "L B N E"], h: Float[Array, "B N E"], reverse: bool, sequential: bool
) -> Float[Array, "L B N E"]:
    """`h_t = a_t h_{t-1} + b_t`, from the last to the first when `reverse`.

    A sequential loop reads each element once, which is faster on a CPU; the associative scan has log2(L) parallel
    steps.
    """
    if sequential:

        def step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
            h = ab[0] * h + ab[1]
            return h, h

        return jax.lax.scan(step, h, (a, b), reverse=reverse)[1]
    first = -1 if reverse else 0
    b = b.at[first].add(a[first] * h)
    return jax.lax.associative_scan(lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1]), (a, b), reverse=reverse)[1]


def _decays(
    dt: Float[Array, "L B E"], A: Float[Array, "N E"], start: Bool[Array, "L B"] | None
) -> Float[Array, "L B N E"]:
    a = jnp.exp(dt[:, :, None] * A)
    return a if start is None else jnp.where(start[:, :, None, None], 0, a)


def _add_products(
    total: Float[Array, "B N E"], x: Float[Array, "L B N E"], y: Float[Array, "L B E"], sequential: bool
) -> Float[Array, "B N E"]:
    """`total + sum_t x_t y_t`; on a CPU the reduction is several times slower than the loop."""
    if not sequential:
        return total + jnp.sum(x * y[:, :, None], axis=0)

    def step(total: Array, xy: tuple[Array, Array]) -> tuple[Array, None]:
        return total + xy[0] * xy[1][:, None], None

    return jax.lax.scan(step, total, (x, y))[0]


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(
    u: Float[Array, "M L B E"],
    dt: Float[Array, "M L B E"],
    A: Float[Array, "N E"],
    B: Float[Array, "M L B N"],
    C: Float[Array, "M L B N"],
    start: Bool[Array, "M L B"] | None,
    state: Float[Array, "B N E"],
    sequential: bool,
) -> tuple[Float[Array, "M L B E"], Float[Array, "B N E"]]:
    return _scan_fwd(u, dt, A, B, C, start, state, sequential)[0]


def _scan_fwd(
    u: Array, dt: Array, A: Array, B: Array, C: Array, start: Array | None, state: Array, sequential: bool
) -> tuple[tuple[Array, Array], tuple]:
    def chunk(h: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        u, dt, b, c, start = inputs
        states = _recurrence(_decays(dt, A, start), b[..., None] * u[:, :, None], h, False, sequential)
        return states[-1], (jnp.einsum("lbn,lbne->lbe", c, states), h)

    last, (y, between) = jax.lax.scan(chunk, state, (u, dt, B, C, start))
    return (y, last), (u, dt, A, B, C, start, between)


def _scan_bwd(sequential: bool, saved: tuple, gradients: tuple[Array, Array]) -> tuple:
    """With `g_t = dloss/dh_t = C_t dy_t + a_{t+1} g_{t+1}`, all other gradients are products with `g` and `h`."""
    u, dt, A, B, C, start, between = saved
    d_y, d_last = gradients
    ones = jnp.ones(A.shape[0], A.dtype)  # a sum over states as a product with ones: XLA reduces far more slowly

    def chunk(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], tuple]:
        from_later, d_A = carry  # a_{t+1} g_{t+1} of the last token, and the gradient of A in later chunks
        u, dt, b, c, start, h, d_y = inputs
        a = _decays(dt, A, start)
        states = _recurrence(a, b[..., None] * u[:, :, None], h, False, sequential)
        before = jnp.concatenate([h[None], states[:-1]])
        next_a = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
        g = _recurrence(next_a, c[..., None] * d_y[:, :, None], from_later, True, sequential)
        d_exponent = g * a * before  # of dt A, within the exponential
        d_dt = jnp.einsum("lbne,n->lbe", d_exponent * A, ones)
        d_A = _add_products(d_A, d_exponent, dt, sequential)
        d_u = jnp.einsum("lbne,lbn->lbe", g, b)
        d_b = jnp.einsum("lbne,lbe->lbn", g, u)
        d_c = jnp.einsum("lbne,lbe->lbn", states, d_y)
        return (a[0] * g[0], d_A), (d_u, d_dt, d_b, d_c)

    inputs = (u, dt, B, C, start, between, d_y)
    zeros = jnp.zeros_like(d_last)
    (d_state, d_A), (d_u, d_dt, d_B, d_C) = jax.lax.scan(chunk, (d_last, zeros), inputs, reverse=True)
    return d_u, d_dt, jnp.sum(d_A, axis=0), d_B, d_C, None, d_state


_scan.defvjp(_scan_fwd, _scan_bwd)
