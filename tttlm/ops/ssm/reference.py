"""The definitions of the recurrences of Mamba and Mamba-2, one token after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

IMPLEMENTATIONS = ("chunked", "reference")  # implementations of `selective_scan` and `ssd`


def selective_scan_reference(
    u: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B N E"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B N E"]]:
    """`h_t = exp(dt_t A) h_{t-1} + B_t u_t`, `y_t = C_t h_t` with `u = dt x`; see `selective_scan`."""

    def token(h: Array, inputs: tuple) -> tuple[Array, Array]:
        u, dt, b, c, start = inputs
        if start is not None:
            h = jnp.where(start[:, None, None], 0, h)
        h = jnp.exp(dt[:, None] * A.T) * h + b[:, :, None] * u[:, None]
        return h, jnp.einsum("bn,bne->be", c, h)

    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, dt, B, C, start))
    state, y = jax.lax.scan(token, state, inputs)
    return jnp.swapaxes(y, 0, 1), state


def ssd_reference(
    u: Float[Array, "B T H P"],
    log_decay: Float[Array, "B T H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B H P N"],
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """`h_t = exp(log_decay_t) h_{t-1} + u_t B_tᵀ`, `y_t = h_t C_t` with `u = dt x`; see `ssd`."""
    repeats = u.shape[2] // B.shape[2]

    def token(h: Array, inputs: tuple) -> tuple[Array, Array]:
        u, log_decay, b, c, start = inputs
        if start is not None:
            h = jnp.where(start[:, None, None, None], 0, h)
        b, c = (jnp.repeat(z, repeats, axis=1) for z in (b, c))  # [B, H, N]
        h = jnp.exp(log_decay)[:, :, None, None] * h + u[..., None] * b[:, :, None]
        return h, jnp.einsum("bhpn,bhn->bhp", h, c)

    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, log_decay, B, C, start))
    state, y = jax.lax.scan(token, state, inputs)
    return jnp.swapaxes(y, 0, 1), state
