"""What `Attention` promises beside the contract of all layers: its cache, its heads, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.mixers.attention.layer import Attention

WIDTH = 16
INIT = nnx.initializers.normal(0.4)


def layer(**options):
    return Attention(WIDTH, 4, kernel_init=INIT, rngs=nnx.Rngs(0), **options)


def random_rows(time, batch=2, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, time, WIDTH)).astype(dtype))


def in_pieces(attention, x, cuts, ids=None):
    state, outputs, start = attention.init_state(x.shape[0]), [], 0
    extend = nnx.jit(Attention.extend)
    for length in cuts:
        piece = slice(start, start + length)
        y, state = extend(attention, x[:, piece], state, None if ids is None else ids[:, piece])
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("x64")
def test_pieces_shorter_and_longer_than_the_window_give_the_same(packed):
    attention = layer(sliding_window=5, num_kv_heads=2, dtype=jnp.float64, param_dtype=jnp.float64)
    x = random_rows(22, dtype=np.float64)
    ids = jnp.asarray([[1] * 4 + [2] * 15 + [3] * 3, [0] * 2 + [7] * 6 + [0] * 3 + [7] * 11]) if packed else None
    pieces, _ = in_pieces(attention, x, (1, 9, 1, 1, 9, 1), ids)
    real = 1 if ids is None else (ids != 0)[..., None]
    np.testing.assert_allclose(pieces * real, nnx.jit(attention)(x, ids) * real, rtol=1e-9, atol=1e-12)


def test_a_window_is_all_that_is_seen_and_all_that_is_kept():
    attention, x = layer(sliding_window=5), random_rows(12)
    reached = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attention(x)[:, 9]))))(x)
    assert list(np.flatnonzero(np.any(reached[0] != 0, axis=-1))) == [5, 6, 7, 8, 9]
    assert attention.init_state(1).keys.shape[1] == 5


def test_the_cache_says_when_it_is_full():
    attention, x = layer(max_length=8), random_rows(10)
    with pytest.raises(ValueError, match=r"room for 8 tokens, got 9: raise max_length"):
        attention.extend(x[:, 6:9], attention.init_state(2)._replace(offset=jnp.asarray([2, 6])))
    with pytest.raises(ValueError, match="max_length"):
        layer().init_state(1)


@pytest.mark.parametrize("cuts", [(6, 1, 1, 1, 1), (7, 3), (10,)])
def test_where_offsets_are_not_known_what_has_no_room_is_nan_and_the_rest_right(cuts):
    attention, x = layer(max_length=8), random_rows(10)
    y, _ = in_pieces(attention, x, cuts)
    assert np.all(np.isnan(y[:, 8:]))
    np.testing.assert_allclose(y[:, :8], attention(x)[:, :8], rtol=1e-4, atol=1e-5)


def test_grouped_heads_are_full_heads_that_share_keys_and_values():
    grouped, full = layer(num_kv_heads=2), layer()
    for name in ("q_proj", "o_proj"):
        getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
    for name in ("k_proj", "v_proj"):
        kernel = getattr(grouped, name).kernel[...].reshape(WIDTH, 2, 4)
        getattr(full, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(WIDTH, -1)
    x = random_rows(9)
    np.testing.assert_allclose(grouped(x), full(x), rtol=1e-4, atol=1e-5)


def test_normed_queries_and_keys_have_no_scale():
    plain, normed = layer(), layer(qk_norm=True)
    x = random_rows(6)
    before = plain(x), normed(x)
    for attention in (plain, normed):
        attention.k_proj.kernel[...] = 3 * attention.k_proj.kernel[...]
    assert np.max(np.abs(plain(x) - before[0])) > 0.01
    np.testing.assert_allclose(normed(x), before[1], rtol=1e-4, atol=1e-5)


def test_the_cache_is_of_the_dtype_that_is_computed_in():
    attention = layer(max_length=12, dtype=jnp.bfloat16)
    x = random_rows(12).astype(jnp.bfloat16)
    y, state = in_pieces(attention, x, (5, 7))
    assert y.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
    assert attention.q_proj.kernel.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(np.float32), attention(x).astype(np.float32), atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_kv_heads": 3}, "num_kv_heads"), ({"head_dim": 5}, "even"), ({"sliding_window": 0}, "sliding_window")],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_a_named_implementation_is_the_one_used():
    with pytest.raises(ValueError, match="nonsense"):
        layer(implementation="nonsense")(random_rows(4))
