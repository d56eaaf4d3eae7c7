"""Small systems of linear equations, solved with products and element-wise operations alone.

A linear algebra library called from a loop over time waits for threads on a CPU whose cores are busy, up to minutes.
None of the systems here needs pivots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LEAF = 16  # rows that are eliminated one after the other


def inverse_of_unit_lower(lower: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The inverse of `I + lower`, strictly lower triangular, from blocks of its diagonal twice as large at every turn.

    [A 0; C B]^-1 = [A^-1 0; -B^-1 C A^-1 B^-1]
    """
    index = jnp.arange(len(lower))
    inverse, size = jnp.eye(len(lower), dtype=lower.dtype), 1
    while size < len(lower):
        block, pair = index // size, index // (2 * size)
        below = (pair[:, None] == pair) & (block[:, None] > block)
        inverse = inverse - inverse @ jnp.where(below, lower, 0) @ inverse
        size *= 2
    return inverse


def substitute(
    rates: Float[Array, "m V"], right: Float[Array, "m V"], system: Float[Array, "m m"]
) -> Float[Array, "m V"]:
    """`u` with `u = rates o (right - system u)`, `system` strictly lower triangular: the first half, then the second.

    Every column has rates, and so a triangular system, of its own; none of these systems is formed.
    """
    size = len(right)
    if size == 1:
        return rates * right
    half = size // 2
    first = substitute(rates[:half], right[:half], system[:half, :half])
    second = substitute(rates[half:], right[half:] - system[half:, :half] @ first, system[half:, half:])
    return jnp.concatenate([first, second])


def solve_positive(matrix: Float[Array, "K K"], right: Float[Array, "K R"]) -> Float[Array, "K R"]:
    """`matrix^-1 right` for a symmetric positive definite matrix; its gradient is one more solve."""
    constant = jax.lax.stop_gradient(matrix)
    solve = lambda _, b: _by_halves(constant, b)
    return jax.lax.custom_linear_solve(lambda x: matrix @ x, right, solve, symmetric=True)


def _by_halves(matrix: Float[Array, "K K"], right: Float[Array, "K R"]) -> Float[Array, "K R"]:
    """The solution for `[P Q; Qᵀ S]` from that for `P`, and that for its complement `S - Qᵀ P^-1 Q`."""
    size = len(matrix)
    if size <= LEAF:
        return _eliminated(matrix, right)
    half = size // 2
    beside, below = matrix[:half, half:], matrix[half:, half:]
    of_first = _by_halves(matrix[:half, :half], jnp.concatenate([beside, right[:half]], axis=1))
    over, first = of_first[:, : size - half], of_first[:, size - half :]
    second = _by_halves(below - beside.T @ over, right[half:] - beside.T @ first)
    return jnp.concatenate([first - over @ second, second])


def _eliminated(matrix: Float[Array, "K K"], right: Float[Array, "K R"]) -> Float[Array, "K R"]:
    """Gauss-Jordan elimination: row after row is made that of the identity."""
    rows = jnp.arange(len(matrix))

    def turn(both: Float[Array, "K N"], i: Array) -> tuple[Float[Array, "K N"], None]:
        row = both[i] / both[i, i]
        return jnp.where((rows == i)[:, None], row, both - both[:, i, None] * row), None

    both, _ = jax.lax.scan(turn, jnp.concatenate([matrix, right], axis=1), rows)
    return both[:, len(matrix) :]
