"""The inner model, its loss and its read-out: f(x) = W_d gelu(... gelu(x W_1 + b_1) ...) + b_d, then a LayerNorm.

From the paper (arXiv 2407.04620, section 2 and appendix): the inner model reconstructs `v` from `k` as
`k + LN(f(k))`, so the loss of one token is `|LN(f(k)) - (v - k)|^2 / 2` (eq. 4 with the residual and the norm of
section 2.7); it is read out as `q + LN(f(q))`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

activation = jax.nn.gelu  # the tanh approximation, as in the released models


def activation_gradient(z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The derivative of the tanh-approximated GELU."""
    c, a = 0.7978845608028654, 0.044715  # sqrt(2/pi), and the cubic's coefficient
    t = jnp.tanh(c * (z + a * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * a * z * z)


def layer_norm(
    z: Float[Array, "*S K"], scale: Float[Array, "*#S K"], bias: Float[Array, "*#S K"], eps: float
) -> Float[Array, "*S K"]:
    """`scale * (z - mean) / sqrt(var + eps) + bias` over the last axis."""
    normal, _ = _normalise(z, eps)
    return scale * normal + bias


def loss_gradient(
    z: Float[Array, "*S K"],
    target: Float[Array, "*S K"],
    scale: Float[Array, "*#S K"],
    bias: Float[Array, "*#S K"],
    eps: float,
) -> Float[Array, "*S K"]:
    """The gradient of `|layer_norm(z) - target|^2 / 2` with respect to `z`, in closed form."""
    normal, inverse = _normalise(z, eps)
    g = scale * (scale * normal + bias - target)
    return inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - normal * jnp.mean(g * normal, axis=-1, keepdims=True))


def _normalise(z: Float[Array, "*S K"], eps: float) -> tuple[Float[Array, "*S K"], Float[Array, "*S 1"]]:
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + eps)
    return z * inverse, inverse
