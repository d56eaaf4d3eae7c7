"""What `Mamba2` promises beside the contract of all layers: the published equations and initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.mixers.mamba2.layer import Mamba2

WIDTH, HEADS, P, N = 12, 4, 6, 3


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("groups", "norm_groups", "dt_limit"), [(1, 1, (0.0, np.inf)), (2, 2, (0.01, 0.03))])
@pytest.mark.usefixtures("x64")
def test_the_layer_is_its_equations_written_out(groups, norm_groups, dt_limit):
    layer = Mamba2(
        WIDTH,
        state_size=N,
        head_dim=P,
        num_groups=groups,
        norm_groups=norm_groups,
        dt_limit=dt_limit,
        chunk_size=2,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    layer.norm.scale[...] = jnp.linspace(0.5, 2, 24)
    x = np.random.default_rng(1).normal(size=(1, 5, WIDTH))
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    channels = 24 + 2 * groups * N
    gate, u, dt = np.split(x[0] @ p["in_proj"]["kernel"], (24, 24 + channels), axis=-1)
    padded = np.concatenate([np.zeros((3, channels)), u])
    u = silu(sum(padded[w : w + 5] * p["conv"]["kernel"][w] for w in range(4)) + p["conv"]["bias"])
    u, B, C = np.split(u, (24, 24 + groups * N), axis=-1)
    u, B, C = u.reshape(5, HEADS, P), B.reshape(5, groups, N), C.reshape(5, groups, N)
    dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *dt_limit)
    y = np.zeros((5, HEADS, P))
    for i in range(HEADS):
        h, group = np.zeros((P, N)), i * groups // HEADS
        for t in range(5):
            h = np.exp(-dt[t, i] * np.exp(p["A_log"][i])) * h + dt[t, i] * np.outer(u[t, i], B[t, group])
            y[t, i] = h @ C[t, group] + p["D"][i] * u[t, i]
    y = (y.reshape(5, 24) * silu(gate)).reshape(5, norm_groups, -1)
    y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-5)
    wanted = (y.reshape(5, 24) * p["norm"]["scale"]) @ p["out_proj"]["kernel"]
    np.testing.assert_allclose(nnx.jit(layer)(jnp.asarray(x))[0], wanted, rtol=1e-9)


def test_initial_weights_are_those_of_the_released_models():
    layer = Mamba2(256, head_dim=2, rngs=nnx.Rngs(0))
    steps, rates = jax.nn.softplus(layer.dt_bias[...]), np.exp(layer.A_log[...])
    assert 1e-3 * 0.99 < np.min(steps) < 1.2e-3
    assert 0.08 < np.max(steps) < 0.1 * 1.01
    assert 1 <= np.min(rates) < 1.3
    assert 15.7 < np.max(rates) <= 16
    assert np.all(layer.D[...] == 1)


def test_states_are_float32_whatever_is_computed_in():
    options = {"state_size": N, "head_dim": P, "rngs": nnx.Rngs(0)}
    layer = Mamba2(WIDTH, dtype=jnp.bfloat16, **options)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, WIDTH)), jnp.bfloat16)
    y, state = nnx.jit(Mamba2.extend)(layer, x, layer.init_state(2))
    assert y.dtype == state.tail.dtype == jnp.bfloat16
    assert state.ssm.dtype == jnp.float32
    exact = nnx.jit(Mamba2(WIDTH, **(options | {"rngs": nnx.Rngs(0)})))(x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.03 * float(np.max(np.abs(exact))))


@pytest.mark.parametrize("options", [{"head_dim": 7}, {"num_groups": 3}, {"norm_groups": 5}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Mamba2(WIDTH, **({"head_dim": P} | options), rngs=nnx.Rngs(0))
