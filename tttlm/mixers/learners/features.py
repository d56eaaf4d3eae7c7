"""Polynomial features of queries and keys."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations_with_replacement

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tttlm.mixers.learners.conventions import unit


@dataclass(frozen=True)
class PolynomialFeatures:
    """All monomials up to a degree of a normalised vector, so that a memory of more pairs can be linear.

    They are weighted for `φ(q) · φ(k) = Σ_i (q · k)^i / i!`, the Taylor series of the exponential kernel of attention
    (arXiv 2505.23735, section 3.1). `K` channels become `(K + degree)! / (K! degree!)` features.

    Attributes:
        degree: the largest degree.
    """

    degree: int

    def __call__(self, x: Float[Array, "*S K"]) -> Float[Array, "*S F"]:
        x, blocks = unit(x), []
        for degree in range(self.degree + 1):
            monomials = self._monomials(x.shape[-1], degree)
            weights = [math.prod(math.factorial(n) for n in Counter(one).values()) ** -0.5 for one in monomials]
            index = np.array(monomials, int).reshape(len(monomials), degree)
            blocks.append(jnp.prod(x[..., index], axis=-1) * jnp.asarray(weights, x.dtype))
        return jnp.concatenate(blocks, axis=-1)

    def degrees(self, channels: int) -> np.ndarray:
        """The degree of every feature of that many channels."""
        sizes = [len(self._monomials(channels, degree)) for degree in range(self.degree + 1)]
        return np.repeat(np.arange(self.degree + 1), sizes)

    def _monomials(self, channels: int, degree: int) -> list[tuple[int, ...]]:
        return list(combinations_with_replacement(range(channels), degree))
