"""Compiles programs for eight simulated CPU devices and prints what they exchange, as JSON.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.planning.plans`.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from tests.training.small import small_config
from tttlm.planning.collectives import collectives
from tttlm.planning.plan import Plan, compiled_plan
from tttlm.training.config import MeshConfig
from tttlm.training.devices import Device
from tttlm.training.sharding import make_mesh


def exchanges() -> dict[str, Any]:
    """Loops of 5 and 3 turns around a sum of 8 numbers, and what is gathered and scattered around them."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False)
    def program(x: jax.Array) -> jax.Array:  # [8] of 64 on each device
        def inner(x, _):
            return jax.lax.psum(x * 0.5, "x") + 1, None

        def outer(x, _):
            x = jax.lax.scan(inner, jnp.sin(x), None, length=3)[0]
            return x + jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), None

        x = jax.lax.scan(outer, x, None, length=5)[0]
        gathered = jax.lax.all_gather(x, "x", tiled=True)  # [64]
        return jax.lax.psum_scatter(jnp.cos(gathered), "x", tiled=True)

    text = jax.jit(program).lower(jnp.zeros(64)).compile().as_text()
    found, known = collectives(text)
    return {"known": known, **{one.kind: [one.count, one.bytes] for one in found}}


def plan(**axes: int) -> Plan:
    config = small_config(mesh=MeshConfig(**{"fsdp": 1, **axes}), batch_size=8)
    mesh: Mesh = make_mesh(config.mesh)
    return compiled_plan(config, mesh, "cpu:8", Device("cpu", "cpu", 2**30, 1.0))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    plans = {"data": plan(data=8), "fsdp": plan(fsdp=8)}
    print(json.dumps({"exchanges": exchanges(), **{name: one.as_dict() for name, one in plans.items()}}))
