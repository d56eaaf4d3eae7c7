"""Gradients that agree are what makes test-time training help: measured, and proved on random convex problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.adaptation.models import samples, tiny
from tttlm.adaptation import cross_entropy, denoising_objective, gradient_alignment, safe_step
from tttlm.adaptation.y_shape import SHARED


@pytest.mark.parametrize("parallel", [1, 2])
def test_alignment_is_that_of_the_two_gradients_sample_by_sample(parallel):
    model, inputs, labels, objective = tiny(), samples(3), np.arange(3), denoising_objective(0.2)
    found = gradient_alignment(model, objective, inputs, labels, shared=SHARED, parallel=parallel)
    keys = jax.random.split(jax.random.key(0), 3)
    graph, params, rest = nnx.split(model, SHARED, ...)
    for i in range(3):
        gradients = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])
            for loss in (
                lambda p: cross_entropy(nnx.merge(graph, p, rest), inputs[i : i + 1], labels[i : i + 1]),  # noqa: B023
                lambda p: objective(nnx.merge(graph, p, rest), inputs[i : i + 1], keys[i]),  # noqa: B023
            )
        ]
        norms = [np.linalg.norm(g) for g in gradients]
        assert float(found.inner_product[i]) == pytest.approx(gradients[0] @ gradients[1], rel=1e-3, abs=1e-6)
        assert float(found.cosine[i]) == pytest.approx(gradients[0] @ gradients[1] / np.prod(norms), rel=1e-3, abs=1e-5)
        assert [float(found.main_norm[i]), float(found.self_supervised_norm[i])] == pytest.approx(norms, rel=1e-3)


def test_a_loss_is_aligned_with_itself_and_a_vanished_gradient_with_nothing():
    inputs, labels = samples(4), np.arange(4) % 3
    itself = lambda model, x, key: cross_entropy(
        model, x, jnp.asarray(labels)[jnp.argmin(jnp.abs(inputs - x).sum(1))][None]
    )
    aligned = gradient_alignment(tiny(), itself, inputs, labels, shared=SHARED)
    np.testing.assert_allclose(aligned.cosine, 1, atol=1e-4)
    constant = gradient_alignment(tiny(), lambda model, x, key: 0.0 * model(x).sum(), inputs, labels, shared=SHARED)
    assert np.all(constant.cosine == 0)


def random_problem(rng: np.random.Generator, kind: str):
    """A convex loss with its smoothness, in 5 dimensions: least squares or logistic regression."""
    a, b = rng.normal(size=(7, 5)), rng.normal(size=7)
    if kind == "squares":
        return lambda w: 0.5 * jnp.mean((a @ w - b) ** 2), np.linalg.norm(a.T @ a / 7, 2)
    return lambda w: jnp.mean(jnp.logaddexp(0, -jnp.sign(b) * (a @ w))), np.linalg.norm(a.T @ a / 28, 2)


@pytest.mark.parametrize("kind", ["squares", "logistic"])
@given(seed=st.integers(0, 2**32 - 1))
def test_theorem_1_a_step_on_an_aligned_loss_lowers_the_main_one(kind, seed, x64):
    rng = np.random.default_rng(seed)
    main, smoothness = random_problem(rng, kind)
    other, _ = random_problem(rng, "squares")
    w = jnp.asarray(rng.normal(size=5))
    g_main, g_other = jax.grad(main)(w), jax.grad(other)(w)
    inner = float(g_main @ g_other)
    if inner < 0:  # descend on the other side: minus a loss is a loss as well, and need not be convex
        g_other, inner = -g_other, -inner
    bound = max(float(jnp.linalg.norm(g_main)), float(jnp.linalg.norm(g_other)))
    epsilon = inner * rng.uniform(0.05, 0.999)
    after = main(w - safe_step(epsilon, smoothness, bound) * g_other)
    # The theorem says lower; its proof says by how much at least.
    assert float(main(w) - after) >= epsilon**2 / (2 * smoothness * bound**2) * (1 - 1e-9)


def test_without_the_premise_the_step_can_raise_the_main_loss(x64):
    main = lambda w: 0.5 * w @ w
    w, g_other = jnp.array([1.0, 0.0]), jnp.array([-0.1, 1.0])  # an inner product below zero
    assert main(w - safe_step(0.5, 1.0, 1.01) * g_other) > main(w)
