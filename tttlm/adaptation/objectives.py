"""Losses without labels, which a model minimises at test time and in joint training.

Each is `objective(model, inputs, rng) -> loss`. The model solves the self-supervised task by
`model.self_supervised(inputs)`, as a `YShaped` model does.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tttlm.adaptation.adapter import Objective
from tttlm.errors import InputError


class SelfSupervised(Protocol):
    """A model with a branch for the self-supervised task."""

    def self_supervised(self, inputs: Array) -> Array: ...


def rotation_objective(model: SelfSupervised, inputs: Float[Array, "B S S C"], rng: Array) -> Float[Array, ""]:
    """Cross-entropy of predicting by which quarter turn an image was rotated, the mean over all four turns of each
    image.

    The task of arXiv 1909.13231, section 3, from arXiv 1803.07728. `model.self_supervised` gives logits `[4 B, 4]`.

    Raises:
        InputError: the images are not square.
    """
    if inputs.ndim != 4 or inputs.shape[1] != inputs.shape[2]:
        raise InputError(f"rotation needs square images [B, S, S, C], got {inputs.shape}")
    turned = jnp.concatenate([jnp.rot90(inputs, turns, axes=(1, 2)) for turns in range(4)])
    labels = jnp.repeat(jnp.arange(4), len(inputs))
    return optax.softmax_cross_entropy_with_integer_labels(model.self_supervised(turned), labels).mean()


def masked_objective(fraction: float = 0.5, patch: int = 1) -> Objective:
    """Mean squared error on masked inputs: a random `fraction` of the inputs is set to zero, and
    `model.self_supervised` reconstructs it.

    Args:
        fraction: the probability of masking a patch.
        patch: for images `[B, S, S, C]`, the side of the squares that are masked in all channels; 1 for features
            `[B, D]`, whose entries are masked one by one.

    Raises:
        InputError: the fraction is not between 0 and 1, or, when the objective is called, patches do not divide the
            inputs.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the masked fraction is between 0 and 1, got {fraction}")

    def objective(model: SelfSupervised, inputs: Array, rng: Array) -> Array:
        space = inputs.shape[1:3] if inputs.ndim == 4 else inputs.shape[1:]
        if any(side % patch for side in space):
            raise InputError(f"patches of {patch} do not divide inputs of shape {inputs.shape[1:]}")
        cells = tuple(side // patch for side in space)
        hidden = jax.random.bernoulli(rng, fraction, (len(inputs), *cells))
        for axis in range(1, hidden.ndim):
            hidden = jnp.repeat(hidden, patch, axis)
        hidden = hidden.reshape(*hidden.shape, *[1] * (inputs.ndim - hidden.ndim))
        rebuilt = model.self_supervised(jnp.where(hidden, 0, inputs)).reshape(inputs.shape)
        weight = jnp.broadcast_to(hidden, inputs.shape)
        return jnp.sum(weight * (rebuilt - inputs) ** 2) / jnp.maximum(jnp.sum(weight), 1)

    return objective


def denoising_objective(noise: float = 0.3) -> Objective:
    """Mean squared error of the inputs that `model.self_supervised` reconstructs from themselves plus Gaussian noise.

    Args:
        noise: standard deviation of the noise, in the units of the inputs.
    """

    def objective(model: SelfSupervised, inputs: Array, rng: Array) -> Array:
        noisy = inputs + noise * jax.random.normal(rng, inputs.shape, inputs.dtype)
        return jnp.mean((model.self_supervised(noisy).reshape(inputs.shape) - inputs) ** 2)

    return objective


def entropy_objective(model: Any, inputs: Array, rng: Array) -> Float[Array, ""]:
    """Mean entropy of the predicted classes, in nats, which TENT minimises (arXiv 2006.10726, equation 1)."""
    log_p = jax.nn.log_softmax(model(inputs))
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def on_random_crops(objective: Objective, *, copies: int, padding: int, flip: bool = False) -> Objective:
    """The objective on random copies of each image: a single image becomes a batch (arXiv 1909.13231, section 3).

    Args:
        objective: an objective of images `[B, S, S, C]`.
        copies: number of copies of each image.
        padding: largest shift of a copy in pixels, in both directions; what comes in is zero.
        flip: whether half of the copies are mirrored.
    """

    def shifted(image: Array, key: Array) -> Array:
        where, mirror = jax.random.split(key)
        corner = jax.random.randint(where, (2,), 0, 2 * padding + 1)
        wide = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = jax.lax.dynamic_slice(wide, (corner[0], corner[1], 0), image.shape)
        return jnp.where(jax.random.bernoulli(mirror), crop[:, ::-1], crop) if flip else crop

    def augmented(model: Any, inputs: Array, rng: Array) -> Array:
        crop_key, task_key = jax.random.split(rng)
        keys = jax.random.split(crop_key, len(inputs) * copies)
        return objective(model, jax.vmap(shifted)(jnp.repeat(inputs, copies, axis=0), keys), task_key)

    return augmented
