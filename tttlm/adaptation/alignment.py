"""Agreement of the gradients of main and self-supervised loss, which decides whether test-time training helps.

Theorem 1 of arXiv 1909.13231: for a convex main loss that is beta-smooth in the parameters, whose gradient and that of
the self-supervised loss have norms of at most G and an inner product above epsilon, one gradient step on the
self-supervised loss of size epsilon / (beta G^2) lowers the main loss. `docs/adaptation.md` has the proof.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from tttlm.adaptation.adapter import Objective, split
from tttlm.adaptation.methods import cross_entropy


class Alignment(NamedTuple):
    """Agreement of the gradients of the two losses with respect to the shared parameters, for each sample.

    Attributes:
        inner_product: inner product of the gradients, `[B]`.
        cosine: cosine of the gradients, `[B]`; 0 where a gradient vanishes.
        main_norm, self_supervised_norm: Euclidean norms of the gradients, `[B]`.
    """

    inner_product: Float[Array, "B"]
    cosine: Float[Array, "B"]
    main_norm: Float[Array, "B"]
    self_supervised_norm: Float[Array, "B"]


def gradient_alignment(
    model: nnx.Module,
    objective: Objective,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    shared: Any,
    loss: Any = cross_entropy,
    parallel: int = 1,
    seed: int = 0,
) -> Alignment:
    """Inner product and cosine of the gradients of main and self-supervised loss, for each sample.

    Args:
        model: any NNX model.
        objective: `objective(model, inputs, rng)`.
        inputs: samples `[B, ...]`.
        labels: labels `[B]`; this diagnostic needs them, adaptation does not.
        shared: an `nnx` filter of the parameters that both losses read.
        loss: `loss(model, inputs, labels)`.
        parallel: number of samples computed at a time by `jax.vmap`.
        seed: seed of the random numbers of the objective.
    """
    graph, params, rest = split(model, shared)
    keys = jax.random.split(jax.random.key(seed), len(jnp.asarray(labels)))
    return _alignments(graph, loss, objective, parallel, params, rest, jnp.asarray(inputs), jnp.asarray(labels), keys)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _alignments(
    graph: Any,
    loss: Any,
    objective: Any,
    parallel: int,
    params: Any,
    rest: Any,
    inputs: Array,
    labels: Array,
    keys: Array,
) -> Alignment:
    def one(sample: Any) -> Alignment:
        x, label, key = sample
        main = jax.grad(lambda p: loss(nnx.merge(graph, p, rest, copy=True), x[None], label[None]))(params)
        other = jax.grad(lambda p: objective(nnx.merge(graph, p, rest, copy=True), x[None], key))(params)
        inner = optax.tree.vdot(main, other)
        norms = optax.tree.norm(main), optax.tree.norm(other)
        product = norms[0] * norms[1]
        return Alignment(inner, jnp.where(product > 0, inner / jnp.where(product > 0, product, 1), 0), *norms)

    return jax.lax.map(one, (inputs, labels, keys), batch_size=parallel if parallel > 1 else None)


def safe_step(epsilon: float, smoothness: float, bound: float) -> float:
    """The learning rate of theorem 1, `epsilon / (beta G^2)`, at which a step on the self-supervised loss lowers the
    main loss.

    Args:
        epsilon: lower bound of the inner product of the two gradients, above 0.
        smoothness: `beta` of the main loss, the Lipschitz constant of its gradient.
        bound: upper bound `G` of the norms of both gradients.
    """
    return epsilon / (smoothness * bound**2)
