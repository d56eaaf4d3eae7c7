"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the two layouts of released weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tttlm.ranges import Count, PositiveFloat


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling of Llama 3, for more tokens than it was pretrained on (arXiv 2407.21783).

    A pair that rotates less than `low_freq_factor` times in `original_max_length` tokens rotates `factor` times slower,
    one that rotates more than `high_freq_factor` times is unchanged, and pairs between are interpolated.
    """

    factor: PositiveFloat = 1.0
    """Factor by which slow pairs rotate slower; 1 changes nothing."""
    low_freq_factor: PositiveFloat = 1.0
    """Rotations in `original_max_length` tokens below which a pair is slow."""
    high_freq_factor: PositiveFloat = 4.0
    """Rotations in `original_max_length` tokens above which a pair is unchanged."""
    original_max_length: Count = 8192
    """Sequence length in tokens of the pretraining."""


def rope_frequencies(
    head_dim: int, base: float = 10_000.0, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "half"]:
    """Radians by which each of the `head_dim / 2` pairs rotates per position, in float64.

    These are `base^(-2i/K)`, with `scaling` those of Llama 3.
    """
    half = head_dim // 2
    frequencies = float(base) ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None or scaling.factor == 1:
        return frequencies
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate_pairs(
    x: Float[Array, "B T H K"], positions: Int[Array, "*rows T"], base: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Rotates the interleaved pairs `(2i, 2i+1)` by `positions * base^(-2i/K)`: the layout of TTT weights.

    `positions` is `[T]` or, per sequence, `[B, T]`. Computed in float32 at least; returns that dtype.
    """
    cos, sin = _angles(x, positions, rope_frequencies(x.shape[-1], base))
    cos, sin = (jnp.stack(two, axis=-1).reshape(*cos.shape[:-1], -1) for two in ((cos, cos), (-sin, sin)))
    # Neighbours by shifting: strided slices are slow on CPU, and a TPU pads an axis of length 2 to many times its size.
    even = jnp.arange(x.shape[-1]) % 2 == 0
    other = jnp.where(even, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * cos + other * sin


def rotate_halves(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "*rows T"],
    base: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H K"]:
    """Rotates the pairs `(i, i + K/2)` by `positions` times `rope_frequencies`: the layout of Llama weights.

    `positions` is `[T]` or, per sequence, `[B, T]`. Computed in float32 at least; returns that dtype.
    """
    cos, sin = _angles(x, positions, rope_frequencies(x.shape[-1], base, scaling))
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # Halves change places by a shift: to join two results costs several times as much on CPU.
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def _angles(
    x: Float[Array, "B T H K"], positions: Int[Array, "*rows T"], frequencies: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "*rows T 1 half"], Float[Array, "*rows T 1 half"]]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    positions = positions[..., None, None]  # [.., T, 1, 1]
    angles = positions * frequencies if dtype == jnp.float64 else _reduced(positions, frequencies).astype(dtype)
    return jnp.cos(angles), jnp.sin(angles)


def _reduced(
    positions: Int[Array, "*rows T 1 1"], frequencies: Float[np.ndarray, "half"]
) -> Float[Array, "*rows T 1 half"]:
    """`positions * frequencies` within half a turn, to 2e-6 radians up to position one million.

    In float32 the product alone would have an error of 1e-3 at position 32,768. Here turns are counted in units of
    2^-32, so that full turns overflow, in steps of 1 and of 1024 positions, so that rounding errors of the units do not
    add up.
    """
    one, many = (
        np.round(n * frequencies / (2 * np.pi) % 1 * 2**32).astype(np.uint64).astype(np.uint32) for n in (1, 1024)
    )
    low, high = (part.astype(jnp.uint32) for part in (positions & 1023, positions >> 10))
    phase = jax.lax.bitcast_convert_type(low * one + high * many, jnp.int32)
    return phase.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
