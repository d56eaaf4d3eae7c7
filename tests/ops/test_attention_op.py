"""Every implementation of attention computes the definition, gradients included."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tttlm.ops.attention import attention, cudnn
from tttlm.ops.attention.blockwise import blockwise
from tttlm.ops.attention.reference import reference
from tttlm.ops.attention.splash import splash

pytestmark = pytest.mark.usefixtures("x64")


class Case(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array
    query_segments: jax.Array | None
    key_segments: jax.Array | None


def random_case(
    seed, *, batch=2, time=24, keys=None, num_heads=4, num_kv_heads=2, head_dim=6, segmented=False, dtype=np.float64
):
    """The queries are the last `time` of the `keys` places of a row."""
    rng = np.random.default_rng(seed)
    keys = keys or time
    q = rng.normal(size=(batch, time, num_heads, head_dim)).astype(dtype)
    k, v = (rng.normal(size=(batch, keys, num_kv_heads, head_dim)).astype(dtype) for _ in range(2))
    positions = np.arange(keys, dtype=np.int32)[None]
    segments = np.cumsum(rng.random((batch, keys)) < 0.1, axis=1).astype(np.int32) if segmented else None
    latest = None if segments is None else segments[:, keys - time :]
    return jax.tree.map(jnp.asarray, Case(q, k, v, positions[:, keys - time :], positions, latest, segments))


@partial(jax.jit, static_argnums=(0, 2))
def value_and_gradients(function, case, sliding_window):
    """The outputs, and the gradients of a random projection of them."""
    direction = jnp.asarray(np.random.default_rng(9).normal(size=case.q.shape), case.q.dtype)

    def loss(q, k, v):
        out = function(q, k, v, *case[3:], sliding_window)
        return jnp.sum(out * direction), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*case[:3])
    return out, gradients


def assert_same(got, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_reference_is_softmax_over_what_a_query_sees():
    case, sliding_window = random_case(0, batch=1, time=9, num_heads=4, num_kv_heads=2, segmented=True), 4
    q, k, v = (np.asarray(x[0]) for x in case[:3])
    segments = np.asarray(case.query_segments[0])
    out = reference(*case, sliding_window)
    for t in range(9):
        seen = [s for s in range(t + 1) if t - s < sliding_window and segments[s] == segments[t]]
        for h in range(4):
            weights = np.exp([q[t, h] @ k[s, h // 2] / np.sqrt(6) for s in seen])
            wanted = sum(w * v[s, h // 2] for w, s in zip(weights / weights.sum(), seen, strict=True))
            np.testing.assert_allclose(out[0, t, h], wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("time", "keys", "num_heads", "sliding_window", "segmented", "block"),
    [
        (1, 1, (1, 1), None, False, 4),
        (19, 19, (4, 2), None, False, 4),
        (20, 20, (3, 3), 7, True, 5),
        (5, 23, (4, 1), 9, True, 8),
    ],
)
def test_blockwise_is_the_definition(time, keys, num_heads, sliding_window, segmented, block):
    case = random_case(0, time=time, keys=keys, num_heads=num_heads[0], num_kv_heads=num_heads[1], segmented=segmented)
    got = value_and_gradients(partial(blockwise, block=block), case, sliding_window)
    assert_same(got, value_and_gradients(reference, case, sliding_window), 1e-11)


SMALL_BLOCKS = partial(blockwise, block=4)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_blockwise_is_the_definition_for_any_positions_and_segments(data):
    """One compiled shape; what changes is who sees whom, and so which blocks are passed over."""

    def ids(low, high, size):
        rows = st.lists(st.integers(low, high), min_size=size, max_size=size)
        return jnp.asarray(data.draw(st.lists(rows, min_size=2, max_size=2)), jnp.int32)

    case = random_case(1, time=10, keys=15)._replace(
        query_positions=ids(0, 15, 10),
        key_positions=ids(0, 15, 15),
        query_segments=ids(-1, 2, 10),
        key_segments=ids(-2, 2, 15),
    )
    assert_same(value_and_gradients(SMALL_BLOCKS, case, 6), value_and_gradients(reference, case, 6), 1e-11)


@pytest.mark.parametrize("function", [reference, blockwise])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(function):
    case = random_case(3, time=9, segmented=True)
    alone = case._replace(query_segments=case.query_segments.at[:, 7].set(-1))
    out, gradients = value_and_gradients(function, alone, None)
    assert not np.any(out[:, 7])
    assert not np.any(gradients[0][:, 7])
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_definition():
    """Reverse over reverse, and forward over reverse."""
    case = random_case(11, batch=1, time=10, num_heads=2, num_kv_heads=1, head_dim=2, segmented=True)
    direction = tuple(jnp.asarray(np.random.default_rng(i).normal(size=a.shape)) for i, a in enumerate(case[:3]))

    def products(function):
        gradient = jax.grad(lambda qkv: jnp.sum(jnp.sin(function(*qkv, *case[3:], 6))))
        along = lambda qkv: sum(jnp.vdot(a, b) for a, b in zip(gradient(qkv), direction, strict=True))
        return jax.jit(lambda qkv: (jax.grad(along)(qkv), jax.jvp(gradient, (qkv,), (direction,))[1]))(case[:3])

    expected = products(reference)
    assert_same(expected[0], expected[1], 1e-11)
    assert_same(products(SMALL_BLOCKS), expected, 1e-11)


def test_blockwise_memory_grows_with_time_not_its_square():
    def temporary_bytes(time):
        case = random_case(4, batch=1, time=time, num_heads=2, num_kv_heads=1, head_dim=8, dtype=np.float32)
        return value_and_gradients.lower(blockwise, case, None).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1024), temporary_bytes(8192)
    assert large < 10 * small
    assert large < 2 * 8192**2  # far below the scores of one head


def test_blocks_out_of_sight_are_not_computed():
    """NaN keys that nothing sees would spread through `0 * NaN` if their block were multiplied."""
    case = random_case(5, batch=1, time=32, keys=64)
    poisoned = case._replace(k=case.k.at[:, :16].set(jnp.nan), v=case.v.at[:, :16].set(jnp.nan))
    assert_same(value_and_gradients(lambda *args: blockwise(*args, 8), poisoned, 9)[0], reference(*case, 9), 1e-11)


@pytest.mark.parametrize(("sliding_window", "segmented"), [(None, True), (40, False)])
def test_splash_is_the_definition(sliding_window, segmented):
    with jax.enable_x64(False):  # the kernel computes in float32
        case = random_case(
            6, batch=1, time=128, num_heads=2, num_kv_heads=1, head_dim=16, segmented=segmented, dtype=np.float32
        )
        got = value_and_gradients(partial(splash, interpret=True), case, sliding_window)
        assert_same(got, value_and_gradients(reference, case, sliding_window), 1e-4)


@pytest.mark.parametrize(("sliding_window", "segmented"), [(None, False), (5, False), (5, True)])
def test_cudnn_is_asked_for_the_definition(monkeypatch, sliding_window, segmented):
    """No GPU here: the same call answered by XLA shows that causality, window and segments are handed over right."""
    through_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **kw: through_xla(*a, **{**kw, "implementation": "xla"})
    )
    case = random_case(7, segmented=segmented)
    got = value_and_gradients(cudnn.cudnn, case._replace(query_positions=None, key_positions=None), sliding_window)
    assert_same(got, value_and_gradients(reference, case, sliding_window), 1e-6)
    cached = random_case(7, time=10, keys=24, segmented=segmented)
    if segmented:  # padding sees nothing
        cached = cached._replace(query_segments=cached.query_segments.at[:, 8:].set(-1))
    got = value_and_gradients(cudnn.cudnn, cached, sliding_window)
    assert_same(got, value_and_gradients(reference, cached, sliding_window), 1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the kernel runs on NVIDIA GPUs")
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.parametrize("keys", [256, 640])
def test_cudnn_is_the_definition(sliding_window, segmented, keys):
    """In bfloat16, and as the next tokens of a cache if there are more keys than queries."""
    with jax.enable_x64(False):
        case = random_case(12, time=256, keys=keys, head_dim=64, segmented=segmented, dtype=np.float32)
        if segmented:
            case = case._replace(query_segments=case.query_segments.at[:, 200:].set(-1))
        wanted = value_and_gradients(reference, case, sliding_window)
        if keys == 256:
            case = case._replace(query_positions=None, key_positions=None)
        half = case._replace(**{name: getattr(case, name).astype(jnp.bfloat16) for name in "qkv"})
        assert cudnn.obstacle(half.q, half.k, keys == 256, segmented) is None
        got = value_and_gradients(cudnn.cudnn, half, sliding_window)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)
        if segmented:
            assert not np.any(got[0][:, 200:])


@pytest.mark.parametrize("time", [8, 300])
def test_what_is_picked_is_the_definition(time):
    case = random_case(8, batch=1, time=time)
    out = attention(*case[:3], sliding_window=50)
    np.testing.assert_allclose(out, reference(*case, 50), rtol=1e-10)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on another device one of these is available")
@pytest.mark.parametrize("name", ["cudnn", "splash", "nonsense"])
def test_an_implementation_that_cannot_be_used_fails_in_one_line(name):
    case = random_case(10)
    with pytest.raises(ValueError, match=name) as error:
        attention(*case[:3], implementation=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 24, 3, 6)), "v": jnp.zeros((2, 24, 3, 6))}, "multiple of G"),
        ({"sliding_window": 0}, "a window"),
        ({"query_segments": jnp.zeros((2, 24), jnp.int32)}, "both"),
        ({"q": jnp.zeros((2, 5, 4, 6))}, "positions"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = random_case(11)
    with pytest.raises(ValueError, match=message):
        attention(**({"q": case.q, "k": case.k, "v": case.v} | change))
