"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the two layouts that released weights use."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate_pairs(
    x: Float[Array, "B T H K"], positions: Int[Array, "*rows T"], base: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Turns the interleaved pairs `(2i, 2i+1)` by `positions * base^(-2i/K)`: the layout of TTT weights.

    `positions` is `[T]` or, per row, `[B, T]`. Computed in float32 at least; returns that dtype.
    """
    cos, sin = _angles(x, positions, base)
    cos, sin = (jnp.stack(two, axis=-1).reshape(*cos.shape[:-1], -1) for two in ((cos, cos), (-sin, sin)))
    # Neighbours by shifting: strided slices are slow on CPU, and a TPU pads an axis of length 2 to many times its size.
    even = jnp.arange(x.shape[-1]) % 2 == 0
    other = jnp.where(even, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * cos + other * sin


def rotate_halves(
    x: Float[Array, "B T H K"], positions: Int[Array, "*rows T"], base: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Turns the pairs `(i, i + K/2)` by `positions * base^(-2i/K)`: the layout of Llama weights.

    `positions` is `[T]` or, per row, `[B, T]`. Computed in float32 at least; returns that dtype.
    """
    cos, sin = _angles(x, positions, base)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _angles(
    x: Float[Array, "B T H K"], positions: Int[Array, "*rows T"], base: float
) -> tuple[Float[Array, "*rows T 1 half"], Float[Array, "*rows T 1 half"]]:
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=dtype) / half)
    angles = (positions[..., None].astype(dtype) * frequencies)[..., None, :]  # [.., T, 1, K/2]
    return jnp.cos(angles), jnp.sin(angles)
