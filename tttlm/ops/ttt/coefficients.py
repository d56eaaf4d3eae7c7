"""Momentum and decay over a chunk in closed form: the weights of token `t` are affine in those at its start.

    S_t = momentum_t S_{t-1} + g_t            S_t = carried_t S + Σ_s gathered_ts g_s
    U_t = decay_t U_{t-1} - size_t P_t        U_t = kept_t U - Σ_s lasting_ts size_s P_s

with `P = S`, or its transform. All four are products of gates over ranges of tokens, computed without quotients, so
that gates may be zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def range_products(gate: Float[Array, "*B m"], same: Bool[Array, "m m"]) -> Float[Array, "*B m m"]:
    """`Π_{s<r<=t} gate_r` for all `s <= t` that are tokens of one document, else zero."""
    size = gate.shape[-1]
    after = jnp.tril(jnp.ones((size, size), bool), -1)  # [r, s]: r comes after s
    products = jnp.cumprod(jnp.where(after, gate[..., :, None], 1), axis=-2)
    return jnp.where(same, products, 0)


def from_start(gate: Float[Array, "*B m"], same: Bool[Array, "m m"]) -> Float[Array, "*B m"]:
    """`Π_{r<=t} gate_r` over the tokens of `t`'s document."""
    return jnp.prod(jnp.where(same, gate[..., None, :], 1), axis=-1)


class Coefficients(NamedTuple):
    """The coefficients of a chunk, as above; None if a learner has no momentum or no decay.

    Attributes:
        carried: coefficients `[m]` of the momentum at the start.
        gathered: coefficients `[m, m]` of the gradients in the momentum.
        kept: coefficients `[m]` of the weights at the start.
        lasting: coefficients `[m, m]` of the steps in the weights, times their sizes.
    """

    carried: Float[Array, "*B m"] | None
    gathered: Float[Array, "*B m m"] | None
    kept: Float[Array, "*B m"] | None
    lasting: Float[Array, "*B m m"]


def coefficients(
    momentum: Float[Array, "*B m"] | None,
    decay: Float[Array, "*B m"] | None,
    step_size: Float[Array, "*B m"] | None,
    real: Bool[Array, "*B m"],
    same: Bool[Array, "m m"],
    dtype: jnp.dtype,
) -> Coefficients:
    """The coefficients of a chunk. `same`: which tokens `s <= t` are of one document; padding changes nothing."""
    carried = gathered = kept = None
    if momentum is not None:
        momentum = jnp.where(real, momentum, 1)
        carried, gathered = from_start(momentum, same), range_products(momentum, same)
    lasting = same.astype(dtype)
    if decay is not None:
        decay = jnp.where(real, decay, 1)
        kept, lasting = from_start(decay, same), range_products(decay, same)
    size = real if step_size is None else jnp.where(real, step_size, 0)
    return Coefficients(carried, gathered, kept, lasting * size[..., None, :])
