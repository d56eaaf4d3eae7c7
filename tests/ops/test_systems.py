"""Systems of equations without a library's call have the solutions and gradients of NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.ops.ttt.systems import inverse_of_unit_lower, solve_positive, substitute

rng = np.random.default_rng(0)


@pytest.mark.parametrize("size", [1, 5, 37])
def test_a_positive_system_has_its_solution_and_gradients(size, x64):
    root, right, weights = rng.normal(size=(size, size)), rng.normal(size=(size, 3)), rng.normal(size=(size, 3))
    matrix = root @ root.T + np.diag(rng.uniform(1e-3, 1e3, size))
    score = lambda a, b: (jnp.sum(weights * (x := solve_positive(a, b))), x)
    (of_matrix, of_right), x = jax.jit(jax.grad(score, (0, 1), has_aux=True))(matrix, right)
    expected = np.linalg.solve(matrix, right)
    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-12)
    back = np.linalg.solve(matrix, weights)
    np.testing.assert_allclose(of_right, back, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_matrix, -back @ expected.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 6, 13])
def test_triangular_systems_of_every_column_are_solved_together(size, x64):
    system = np.tril(rng.normal(size=(size, size)), -1)
    rates, right = rng.uniform(0, 2, (size, 4)), rng.normal(size=(size, 4))
    found = jax.jit(substitute)(rates, right, system)
    for rate, b, column in zip(rates.T, right.T, np.asarray(found).T, strict=True):
        expected = np.linalg.solve(np.eye(size) + rate[:, None] * system, rate * b)
        np.testing.assert_allclose(column, expected, rtol=1e-9, atol=1e-9 * np.max(np.abs(expected)))
    inverse = jax.jit(inverse_of_unit_lower)(system)
    np.testing.assert_allclose(inverse @ (np.eye(size) + system), np.eye(size), atol=1e-9 * np.max(np.abs(inverse)))
