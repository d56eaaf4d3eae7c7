"""A linear map with a written transpose has every derivative, and reverse mode uses what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tttlm.ops.linear_map import linear_map


def product(called):
    """`a * b` whose transpose counts its calls."""

    @jax.custom_jvp
    def f(a, b):
        return jnp.sin(a) * b

    def tangent(residuals, x):
        (a, b), (da, db) = residuals, x
        return jnp.cos(a) * b * da + jnp.sin(a) * db

    def transpose(residuals, y):
        called.append(True)
        a, b = residuals
        return y * jnp.cos(a) * b, y * jnp.sin(a)

    f.defjvp(lambda primals, tangents: (f(*primals), linear_map(tangent, transpose, primals, tangents)))
    return f


def test_every_mode_to_second_order():
    with jax.enable_x64(True):
        a, b = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
        check_grads(product([]), (a, b), order=2)


def test_reverse_mode_alone_calls_the_written_transpose():
    called: list[bool] = []
    f = product(called)
    jax.jvp(f, (1.0, 2.0), (1.0, 1.0))
    assert not called
    jax.grad(f)(1.0, 2.0)
    assert called


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 0)])
def test_under_vmap_over_any_arguments(axes):
    size, keys = 2, np.random.default_rng(1)
    a, b = (keys.normal(size=(3,) if axis is None else (size, 3) if axis == 0 else (3, size)) for axis in axes)
    grad = jax.grad(lambda a, b: jnp.sum(product([])(a, b)), argnums=(0, 1))
    got = jax.vmap(grad, in_axes=axes)(a, b)
    for i in range(size):
        want = grad(*(z if axis is None else np.take(z, i, axis) for z, axis in zip((a, b), axes, strict=True)))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g[i], w, rtol=1e-6)


def test_a_constant_tangent_is_no_obstacle():
    f = product([])
    np.testing.assert_allclose(jax.grad(lambda a: f(a, a * 0 + 2.0))(1.0), 2 * np.cos(1.0), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(f, argnums=1)(1.0, 2.0), np.sin(1.0), rtol=1e-6)
