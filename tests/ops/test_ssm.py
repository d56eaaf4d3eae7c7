"""The chunked recurrences of Mamba and Mamba-2 are the token-by-token ones, gradients included, at little memory."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.ops.documents import documents
from tttlm.ops.ssm import selective_scan, ssd

BATCH, CHANNELS, STATES, HEADS, WIDTH = 2, 6, 3, 4, 5


class Case(NamedTuple):
    """What the recurrence reads, and the state it goes on from."""

    inputs: tuple[jax.Array, ...]
    state: jax.Array


def random_case(function, time, *, groups=2, dt_scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(time)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(dtype))

    if function is selective_scan:
        x, dt, A = normal(BATCH, time, CHANNELS), normal(BATCH, time, CHANNELS), normal(CHANNELS, STATES)
        B, C, state = normal(BATCH, time, STATES), normal(BATCH, time, STATES), normal(BATCH, STATES, CHANNELS)
    else:
        x, dt, A = normal(BATCH, time, HEADS, WIDTH), normal(BATCH, time, HEADS), normal(HEADS)
        B, C = normal(BATCH, time, groups, STATES), normal(BATCH, time, groups, STATES)
        state = normal(BATCH, HEADS, WIDTH, STATES)
    return Case((x, jax.nn.softplus(dt) * dt_scale, -jnp.exp(A), B, C), state)


@partial(jax.jit, static_argnums=0, static_argnames=("chunk_size", "implementation"))
def run(function, case, segment_ids=None, **options):
    """Outputs and last state, and the gradients of a random projection of both."""
    docs = None if segment_ids is None else documents(segment_ids, jnp.ones(BATCH, segment_ids.dtype))

    def loss(case):
        y, state = function(*case.inputs, state=case.state, docs=docs, **options)
        rng = np.random.default_rng(1)
        total = sum(jnp.sum(rng.normal(size=a.shape).astype(a.dtype) * a) for a in (y, state))
        return total, (y, state)

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(case)
    return out, gradients


def assert_close(got, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.max(np.abs(b))))


both = pytest.mark.parametrize("function", [selective_scan, ssd], ids=["mamba", "mamba2"])


@pytest.mark.usefixtures("x64")
def test_the_reference_of_mamba_is_its_equation():
    case = random_case(selective_scan, 4)
    x, dt, A, B, C = (np.asarray(a) for a in case.inputs)
    y, _ = selective_scan(*case.inputs, state=case.state, implementation="reference")
    h = np.array(case.state)
    for t in range(4):
        for b in range(BATCH):
            for e in range(CHANNELS):
                h[b, :, e] = np.exp(dt[b, t, e] * A[e]) * h[b, :, e] + dt[b, t, e] * x[b, t, e] * B[b, t]
                np.testing.assert_allclose(y[b, t, e], h[b, :, e] @ C[b, t], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_reference_of_mamba2_is_its_equation():
    case = random_case(ssd, 4)
    x, dt, A, B, C = (np.asarray(a) for a in case.inputs)
    y, _ = ssd(*case.inputs, state=case.state, implementation="reference")
    h = np.array(case.state)
    for t in range(4):
        for b in range(BATCH):
            for i in range(HEADS):
                added = dt[b, t, i] * np.outer(x[b, t, i], B[b, t, i // 2])
                h[b, i] = np.exp(dt[b, t, i] * A[i]) * h[b, i] + added
                np.testing.assert_allclose(y[b, t, i], h[b, i] @ C[b, t, i // 2], rtol=1e-12)


@both
@pytest.mark.parametrize(("time", "chunk"), [(1, None), (21, 8)])
@pytest.mark.usefixtures("x64")
def test_chunks_give_what_the_tokens_give(function, time, chunk):
    case = random_case(function, time)
    assert_close(run(function, case, chunk_size=chunk), run(function, case, implementation="reference"), 1e-12)


@both
@pytest.mark.usefixtures("x64")
def test_chunks_give_what_the_tokens_give_in_documents(function):
    case, rng = random_case(function, 21), np.random.default_rng(2)
    for _ in range(5):
        ids = jnp.asarray(np.repeat(rng.integers(0, 3, (BATCH, 7)), 3, axis=1))
        got = run(function, case, ids, chunk_size=8)
        assert_close(got, run(function, case, ids, implementation="reference"), 1e-12)


@pytest.mark.usefixtures("x64")
def test_the_parallel_recurrence_of_other_devices_gives_the_same(monkeypatch):
    case, ids = random_case(selective_scan, 21), jnp.asarray([[1] * 9 + [0] * 3 + [2] * 9, [0] * 2 + [3] * 19])
    wanted = run(selective_scan, case, ids, implementation="reference")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_close(run(selective_scan, case, ids, chunk_size=7), wanted, 1e-12)


@both
@pytest.mark.usefixtures("x64")
def test_padding_leaves_the_state_as_it_is(function):
    case = random_case(function, 6)
    docs = documents(jnp.zeros((BATCH, 6), jnp.int32), jnp.ones(BATCH, jnp.int32))
    _, state = function(*case.inputs, state=case.state, docs=docs)
    np.testing.assert_array_equal(state, case.state)


@both
def test_extreme_steps_stay_finite_and_right_in_float32(function):
    """Steps so long that a state vanishes within a token: exponents beyond float32 must not become NaN."""
    wide = random_case(function, 200, dt_scale=200.0, dtype=np.float32)
    ids = jnp.asarray(np.repeat([[1, 2], [1, 1]], 100, axis=1))
    got = run(function, wide, ids)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(got))
    assert_close(got[0], run(function, wide, ids, implementation="reference")[0], 1e-4)


@both
def test_memory_is_that_of_a_chunk_not_of_all_states(function):
    """Width 192, 16 states, 2048 tokens: all states would fill 25 MB, the inputs fill 1.6 MB each."""
    time, channels, states = 2048, 192, 16
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if function is selective_scan:
        x, dt, A = f32((1, time, channels)), f32((1, time, channels)), f32((channels, states))
        B = C = f32((1, time, states))
    else:
        x, dt, A = f32((1, time, 3, 64)), f32((1, time, 3)), f32((3,))
        B = C = f32((1, time, 1, states))
    gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(jnp.sin(function(*inputs)[0]))))
    compiled = gradient.lower((x, dt, A, B, C)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < time * channels * states * 4


@both
def test_unknown_implementations_are_refused(function):
    case = random_case(function, 2)
    with pytest.raises(ValueError, match="nonsense"):
        function(*case.inputs, implementation="nonsense")


def test_groups_must_divide_the_heads():
    case = random_case(ssd, 2, groups=3)
    with pytest.raises(ValueError, match="groups"):
        ssd(*case.inputs)
