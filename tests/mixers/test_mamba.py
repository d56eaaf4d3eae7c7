"""What `Mamba` promises beside the contract of all layers: the published equations and initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.mixers.mamba.layer import Mamba

WIDTH = 12


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.usefixtures("x64")
def test_the_layer_is_its_equations_written_out():
    layer = Mamba(WIDTH, state_size=3, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(1, 5, WIDTH))
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    u, gate = np.split(x[0] @ p["in_proj"]["kernel"], 2, axis=-1)
    padded = np.concatenate([np.zeros((3, 24)), u])
    u = silu(sum(padded[w : w + 5] * p["conv"]["kernel"][w] for w in range(4)) + p["conv"]["bias"])
    dt, B, C = np.split(u @ p["x_proj"]["kernel"], (1, 4), axis=-1)
    dt = np.log1p(np.exp(dt @ p["dt_proj"]["kernel"] + p["dt_bias"]))
    h, y = np.zeros((24, 3)), np.zeros((5, 24))
    for t in range(5):
        h = np.exp(-dt[t][:, None] * np.exp(p["A_log"])) * h + (dt[t] * u[t])[:, None] * B[t]
        y[t] = h @ C[t] + p["D"] * u[t]
    wanted = (y * silu(gate)) @ p["out_proj"]["kernel"]
    np.testing.assert_allclose(nnx.jit(layer)(jnp.asarray(x))[0], wanted, rtol=1e-10)


def test_initial_weights_are_those_of_the_released_models():
    layer = Mamba(256, rngs=nnx.Rngs(0))
    assert layer.dt_proj.kernel.shape == (16, 512)
    steps = jax.nn.softplus(layer.dt_bias[...])
    assert 1e-3 * 0.99 < np.min(steps) < 1.2e-3
    assert 0.08 < np.max(steps) < 0.1 * 1.01
    assert abs(np.median(steps) - 1e-2) < 2e-3  # log-uniform
    np.testing.assert_allclose(np.exp(layer.A_log[...][7]), np.arange(1, 17), rtol=1e-5)
    assert np.all(layer.D[...] == 1)
    for kernel, bound in ((layer.in_proj.kernel, 1 / 16), (layer.dt_proj.kernel, 1 / 4)):
        assert 0.98 * bound < np.max(np.abs(kernel[...])) <= bound


def test_states_and_steps_are_float32_whatever_is_computed_in():
    layer = Mamba(WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, WIDTH)), jnp.bfloat16)
    y, state = nnx.jit(Mamba.extend)(layer, x, layer.init_state(2))
    assert y.dtype == state.tail.dtype == jnp.bfloat16
    assert state.ssm.dtype == jnp.float32
    exact = nnx.jit(Mamba(WIDTH, rngs=nnx.Rngs(0)))(x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.02 * float(np.max(np.abs(exact))))
