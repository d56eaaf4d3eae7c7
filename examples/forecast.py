"""Forecasting series of different lengths with a TTT layer: `lengths` says where each ends.

Every series is a sine of its own frequency and phase, which the layer learns as it reads.
$ python examples/forecast.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tttlm import TTTLinear


class Forecaster(nnx.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, rngs: nnx.Rngs):
        self.read = nnx.Linear(1, hidden_size, rngs=rngs)
        self.norm = nnx.RMSNorm(hidden_size, rngs=rngs)
        self.ttt = TTTLinear(hidden_size, num_heads, mini_batch_size=8, rngs=rngs)
        self.out = nnx.Linear(hidden_size, 1, rngs=rngs)

    def __call__(self, series: jax.Array, lengths: jax.Array) -> jax.Array:
        """The next value after each of `series` `[B, T]`, of which `lengths` `[B]` are there."""
        x = self.read(series[..., None])
        return self.out(x + self.ttt(self.norm(x), lengths=lengths))[..., 0]


def batch(key: jax.Array, size: int, time: int) -> tuple[jax.Array, jax.Array]:
    frequency, phase, length = jax.random.split(key, 3)
    angle = jax.random.uniform(frequency, (size, 1), minval=0.2, maxval=1.0) * jnp.arange(time)
    series = jnp.sin(angle + jax.random.uniform(phase, (size, 1), maxval=2 * jnp.pi))
    return series, jax.random.randint(length, (size,), time // 4, time)


@nnx.jit
def train_step(model: Forecaster, optimizer: nnx.Optimizer, series: jax.Array, lengths: jax.Array) -> jax.Array:
    def loss(model: Forecaster) -> jax.Array:
        known = jnp.arange(series.shape[1] - 1) < lengths[:, None]
        return jnp.mean(jnp.square(model(series[:, :-1], lengths) - series[:, 1:]), where=known)

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def main(steps: int = 300, time: int = 64, hidden_size: int = 32) -> list[float]:
    model = Forecaster(hidden_size, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), steps)
    losses = [float(train_step(model, optimizer, *batch(key, 16, time))) for key in keys]
    print(f"mean squared error {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
