"""Transforms of steps and links of weights: functions of one head's pytree.

A *transform* maps the accumulated step `S` to the update of the weights; a *link* maps the accumulator and the initial
weights to the weights that are read. Any hashable function can be used.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
LACT = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def norm(x: Float[Array, "*S"], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The Euclidean norm over `axis`, kept as an axis of one; its gradient at zero is zero, not NaN."""
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


@dataclass(frozen=True)
class Muon:
    """Every matrix of a step is made nearly orthogonal by Newton-Schulz iterations; vectors stay as they are.

    `X / |X|_F`, then for every triple `(a, b, c)`: `X <- a X + (b A + c A²) X` with `A = X Xᵀ`.

    Attributes:
        coefficients: a triple for every iteration.
        eps: number that keeps the first division finite.
        clamp: whether `|X|_F` is replaced by `max(|X|_F, eps)`, or by `|X|_F + eps`.
    """

    coefficients: tuple[tuple[float, float, float], ...] = JORDAN
    eps: float = 1e-7
    clamp: bool = False

    def __call__(self, step: Any) -> Any:
        """The step of one head, leaf by leaf."""
        return jax.tree.map(lambda x: self._matrix(x) if x.ndim == 2 else x, step)

    def _matrix(self, x: Float[Array, "I O"]) -> Float[Array, "I O"]:
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        size = norm(x)
        x = x / (jnp.maximum(size, self.eps) if self.clamp else size + self.eps)

        def iterate(x, abc):
            gram = x @ x.T
            return abc[0] * x + (abc[1] * gram + abc[2] * gram @ gram) @ x, None

        x, _ = jax.lax.scan(iterate, x, jnp.asarray(self.coefficients, x.dtype))
        return x.T if tall else x


@dataclass(frozen=True)
class ClipNorm:
    """A step longer than `maximum` is shortened to it; one norm over all weights of a head."""

    maximum: float

    def __call__(self, step: Any) -> Any:
        """The step of one head."""
        size = norm(jnp.concatenate([x.ravel() for x in jax.tree.leaves(step)]))[0]
        factor = self.maximum / jnp.maximum(size, self.maximum)
        return jax.tree.map(lambda x: factor * x, step)


@dataclass(frozen=True)
class InitialNorm:
    """The norms of every output unit's weights are those of the initial weights (arXiv 2505.23884).

    `W = U / (|U| + eps) |W_0|`, norms over the inputs.
    """

    eps: float = 1e-5

    def __call__(self, accumulator: Any, initial: Any) -> Any:
        """The weights that are read, of one head."""
        return jax.tree.map(lambda u, w: u / (norm(u, 0) + self.eps) * norm(w, 0), accumulator, initial)


@dataclass(frozen=True)
class QNormalized:
    """`W = A / |A|_q^{q-2}`, entry by entry over a whole matrix (Moneta of arXiv 2504.13173)."""

    q: float = 4.0
    eps: float = 1e-6

    def __call__(self, accumulator: Any, initial: Any) -> Any:
        """The weights that are read, of one head."""
        size = lambda a: (jnp.sum(jnp.abs(a) ** self.q) + self.eps**self.q) ** (1 / self.q)
        return jax.tree.map(lambda a: a / size(a) ** (self.q - 2), accumulator)


def softmax_link(accumulator: Any, initial: Any) -> Any:
    """`W = softmax(A)` over the inputs of every output unit, with `A` the log of the weights (Memora of 2504.13173)."""
    return jax.tree.map(lambda a: jax.nn.softmax(a, axis=0), accumulator)


def factor(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The input of the gate itself is the factor."""
    return x


def one_minus(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`1 - x`: the factor of the weights where `x` is the fraction to forget."""
    return 1 - x


def one_minus_sigmoid(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`1 - sigmoid(x)`."""
    return jax.nn.sigmoid(-x)
