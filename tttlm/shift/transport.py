"""Sinkhorn divergence by `ott-jax`, with the costs recomputed in every iteration, some rows at a time.

Importing this needs `ott-jax`. The batches of its own `PointCloud` need an attribute that JAX 0.10 no longer has.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from ott.geometry.pointcloud import PointCloud
from ott.tools import sinkhorn_divergence as ott_divergence


@jax.tree_util.register_pytree_node_class
class BatchedPointCloud(PointCloud):
    """A point cloud with costs `|x - y|^2`; `batch_size` rows of its matrix `[N, M]` are in memory at a time."""

    @property
    def is_online(self) -> bool:
        return True

    def apply_lse_kernel(self, f, g, eps, vec=None, axis=0) -> tuple[jax.Array, jax.Array]:
        """`eps log sum_j vec_j exp((f_i + g_j - C_ij) / eps) - f_i` for every `i`, or with axis 0 over `i` for `j`."""
        x, y = (self.x, self.y) if axis == 1 else (self.y, self.x)
        own, other = (f, g) if axis == 1 else (g, f)
        y_squares = jnp.sum(y * y, 1)

        def of_row(row):
            point, potential = row
            costs = jnp.sum(point * point) + y_squares - 2 * jnp.matmul(y, point, precision=jax.lax.Precision.HIGHEST)
            return logsumexp((potential + other - costs) / eps, b=vec, return_sign=True)

        values, signs = jax.lax.map(of_row, (x, own), batch_size=min(self._batch_size or len(x), len(x)))
        return eps * values - jnp.where(jnp.isfinite(own), own, 0), signs


@partial(jax.jit, static_argnames="batch_size")
def sinkhorn_divergence(x: jax.Array, y: jax.Array, epsilon: float, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """The divergence of the uniformly weighted point clouds `[N, D]` and `[M, D]`, and whether it converged."""
    value, found = ott_divergence.sinkhorn_divergence(BatchedPointCloud, x, y, epsilon=epsilon, batch_size=batch_size)
    return value, jnp.all(jnp.asarray(found.converged))
