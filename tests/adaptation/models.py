"""Small models and samples for the tests of adaptation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.adaptation.y_shape import YShaped


def tiny(seed: int = 0, norm: type | None = None) -> YShaped:
    """A Y of linear layers on 8 features that reconstructs its inputs; 3 classes; ReLU and a norm in between."""
    return nnx.clone(_tiny(seed, norm))


@cache
def _tiny(seed: int, norm: type | None) -> YShaped:
    rngs = nnx.Rngs(seed)
    middle = [] if norm is None else [norm(12, rngs=rngs)]
    shared = nnx.Sequential(nnx.Linear(8, 12, rngs=rngs), *middle, jax.nn.relu)
    return YShaped(shared, nnx.Linear(12, 3, rngs=rngs), nnx.Linear(12, 8, rngs=rngs))


def samples(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def same(one, other) -> bool:
    """Bit for bit."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in leaves)
