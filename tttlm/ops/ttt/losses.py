"""Inner losses of one token and one head: functions from a prediction and its target to a scalar.

A learner uses only the gradient of the loss with respect to the prediction, so any differentiable function can be
passed instead.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


def half_square(prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
    """`|prediction - target|² / 2`."""
    return 0.5 * jnp.sum((prediction - target) ** 2)


def square(prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
    """`|prediction - target|²`; the gradient has the factor 2."""
    return jnp.sum((prediction - target) ** 2)


def mean_square(prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
    """`|prediction - target|² / V`."""
    return jnp.mean((prediction - target) ** 2)


def dot(prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
    """`-<prediction, target>`, the Hebbian loss: its gradient in the prediction is `-target`, whatever the weights."""
    return -jnp.sum(prediction * target)


@dataclass(frozen=True)
class Huber:
    """Half square up to an error of `threshold` in a channel, linear beyond (arXiv 2504.13173)."""

    threshold: float = 1.0

    def __call__(self, prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
        """The loss of one token."""
        size = jnp.abs(prediction - target)
        inside = jnp.minimum(size, self.threshold)
        return jnp.sum(inside * (size - 0.5 * inside))


@dataclass(frozen=True)
class PowerLoss:
    """`Σ |prediction - target|^p`, `p > 1` (arXiv 2504.13173)."""

    p: float = 3.0

    def __call__(self, prediction: Float[Array, "*S V"], target: Float[Array, "V"]) -> Float[Array, ""]:
        """The loss of one token."""
        return jnp.sum(jnp.abs(prediction - target) ** self.p)
