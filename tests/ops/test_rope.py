"""Rotary embeddings turn by the angle that float64 gives, at any position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.ops.rope import RopeScaling, rope_frequencies, rotate_halves, rotate_pairs

POSITIONS = np.asarray([0, 1, 17, 1023, 1024, 4095, 32_768, 131_071, 1_000_003, 2**31 - 1])


def expected(head_dim: int, base: float) -> np.ndarray:
    """`[T, K/2]` complex: where the vector (1, 0) of every pair is turned to."""
    frequencies = base ** (-np.arange(head_dim // 2) / (head_dim // 2))
    return np.exp(1j * ((POSITIONS[:, None] * frequencies.astype(np.longdouble)) % (2 * np.pi)))


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_halves])
def test_float32_angles_are_those_of_float64_at_any_position(rotate, base):
    head_dim = 64
    real = np.zeros((1, len(POSITIONS), 1, head_dim), np.float32)
    parts = (slice(0, None, 2), slice(1, None, 2)) if rotate is rotate_pairs else (slice(0, 32), slice(32, None))
    real[..., parts[0]] = 1
    positions = jnp.asarray(POSITIONS, jnp.int32)
    turned = np.asarray(jax.jit(lambda x, p: rotate(x, p, base))(real, positions))[0, :, 0]
    came = turned[:, parts[0]] + 1j * turned[:, parts[1]]
    # At the last position, farther than any text goes, the rounded units do add up.
    np.testing.assert_allclose(came[:-1], expected(head_dim, base)[:-1], atol=2e-6)
    per_row = np.asarray(rotate(jnp.asarray(real), positions[None], base))[0, :, 0]
    np.testing.assert_allclose(per_row, turned, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    x = jnp.zeros((1, len(POSITIONS), 1, 8)).at[..., :4].set(1.0)
    turned = np.asarray(rotate_halves(x, jnp.asarray(POSITIONS), 1e4))[0, :, 0]
    np.testing.assert_allclose((turned[:, :4] + 1j * turned[:, 4:])[:-2], expected(8, 1e4)[:-2], atol=1e-9)


def test_scaled_pairs_are_slow_unchanged_or_between_by_how_often_they_turn():
    """The three cases of Llama 3 as its authors state them, by wavelength."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)
    plain, scaled = rope_frequencies(128, 5e5), rope_frequencies(128, 5e5, scaling)
    seen = set()
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * np.pi / before
        if wavelength < 8192 / 4:
            wanted, case = before, "unchanged"
        elif wavelength > 8192 / 1:
            wanted, case = before / 8, "slow"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted, case = (1 - smooth) * before / 8 + smooth * before, "between"
        seen.add(case)
        np.testing.assert_allclose(after, wanted, rtol=1e-14)
    assert seen == {"unchanged", "slow", "between"}
    x = jnp.ones((1, 3, 1, 128))
    positions = jnp.asarray([0, 1, 9000])
    assert not np.allclose(rotate_halves(x, positions, 5e5, scaling), rotate_halves(x, positions, 5e5))
    np.testing.assert_array_equal(rotate_halves(x, positions, 5e5, RopeScaling()), rotate_halves(x, positions, 5e5))
