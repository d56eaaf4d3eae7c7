"""What is computed is chosen for the device that it is compiled for, not for the one that compiles it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from tttlm.ops.attention import attention
from tttlm.ops.ssm import ssd
from tttlm.ops.target import target_device, traced_for


def elsewhere(platform: str) -> SimpleNamespace:
    return SimpleNamespace(platform=platform)


def test_the_target_is_the_default_device_outside_of_traced_for():
    tpu = elsewhere("tpu")
    with traced_for(tpu):
        assert target_device() is tpu
    assert target_device() is jax.devices()[0]


def test_a_program_for_a_tpu_has_the_kernel_and_the_chunks_of_a_tpu():
    q = jnp.ones((1, 512, 1, 128))
    x, dt, A, B = jnp.ones((1, 512, 1, 4)), jnp.ones((1, 512, 1)), jnp.ones(1), jnp.ones((1, 512, 1, 4))
    programs = {}
    for platform in ("cpu", "tpu"):
        with traced_for(elsewhere(platform)):
            kernel = "pallas_call" in str(jax.make_jaxpr(lambda q: attention(q, q, q))(q))
            chunks = str(jax.make_jaxpr(lambda *a: ssd(*a, B))(x, dt, A, B)).count("length=2")
            programs[platform] = (kernel, bool(chunks))
    assert programs == {"cpu": (False, False), "tpu": (True, True)}
