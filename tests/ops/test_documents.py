"""Documents in a row are read the same however the row is cut, and a convolution stays within them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tttlm.ops.conv import causal_conv
from tttlm.ops.documents import documents
from tttlm.ops.rope import rotate_halves, rotate_pairs

# One length and few cuts: every shape is compiled anew.
ids = st.lists(st.integers(0, 3), min_size=12, max_size=12)
positions = st.sampled_from([1, 4, 9])
documents, causal_conv = jax.jit(documents), jax.jit(causal_conv)


@given(row=ids, cut=positions)
def test_documents_are_those_of_reading_token_by_token(row, cut):
    in_progress, count, expected = 0, 0, []
    for i in row:
        start = i not in (0, in_progress)
        count, in_progress = count + start, i if i else in_progress
        expected.append((count, i != 0, start))
    docs = documents(jnp.asarray([row]), jnp.zeros(1, jnp.int32))
    assert list(zip(*(np.asarray(a)[0].tolist() for a in (docs.index, docs.real, docs.start)), strict=True)) == expected
    assert docs.last.tolist() == [in_progress]
    first = documents(jnp.asarray([row[:cut]]), jnp.zeros(1, jnp.int32))
    second = documents(jnp.asarray([row[cut:]]), first.last)
    index = jnp.concatenate([first.index, first.last_index[:, None] + second.index], axis=1)
    np.testing.assert_array_equal(index, docs.index)


@given(row=ids, cut=positions, width=st.sampled_from([1, 4]))
def test_convolution_stays_within_documents_and_can_be_cut(row, cut, width):
    rng = np.random.default_rng(len(row))
    x = jnp.asarray(rng.normal(size=(1, len(row), 3)), jnp.float32)
    kernel, bias = jnp.asarray(rng.normal(size=(width, 3)), jnp.float32), jnp.ones(3)
    docs = documents(jnp.asarray([row]), jnp.zeros(1, jnp.int32))
    expected = np.zeros((len(row), 3))
    for t in range(len(row)):
        for w in range(min(width, t + 1)):
            if docs.real[0, t - w] and docs.index[0, t - w] == docs.index[0, t]:
                expected[t] += kernel[width - 1 - w] * x[0, t - w]
    y, _ = causal_conv(x, kernel, bias, docs=docs)
    np.testing.assert_allclose(y[0], expected + 1, rtol=1e-5, atol=1e-5)

    first = documents(jnp.asarray([row[:cut]]), jnp.zeros(1, jnp.int32))
    second = documents(jnp.asarray([row[cut:]]), first.last)
    y1, tail = causal_conv(x[:, :cut], kernel, bias, docs=first)
    y2, _ = causal_conv(x[:, cut:], kernel, bias, tail=tail, docs=second)
    np.testing.assert_allclose(jnp.concatenate([y1, y2], axis=1), y, rtol=1e-5, atol=1e-5)


def test_rotations_turn_pairs_and_only_their_difference_matters():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.float32) for _ in range(2))
    positions = jnp.arange(5)
    for rotate in (rotate_pairs, rotate_halves):
        scores = [jnp.einsum("bthk,bshk->bhts", rotate(q, positions + by), rotate(k, positions + by)) for by in (0, 7)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
        assert not np.allclose(scores[0], jnp.einsum("bthk,bshk->bhts", q, k), atol=1e-2)
    # Both are one rotation, on differently ordered features.
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    np.testing.assert_allclose(
        rotate_pairs(q, positions)[..., order], rotate_halves(q[..., order], positions), atol=1e-6
    )
    angle = 10_000.0 ** (-2 / 8) * 3  # of the second pair at place 3
    turned = rotate_pairs(q, positions)[0, 3, 0, 2:4]
    a, b = q[0, 3, 0, 2:4]
    expected = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    np.testing.assert_allclose(turned, expected, atol=1e-5)
