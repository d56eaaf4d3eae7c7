"""Layers ask JAX's own context for the mesh, so that JAX traces again what was traced on another one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from tttlm.layers import TTTLinear
from tttlm.parts.partition import MESH_AXES, each_device, mesh_axes, num_shards, with_sharding

X = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32)


def mesh(*sizes: int, kind: AxisType = AxisType.Auto, axes=MESH_AXES) -> AbstractMesh:
    return AbstractMesh(sizes, axes, axis_types=(kind,) * len(sizes))


def constraints(function) -> int:
    return str(function.trace(X).jaxpr).count("sharding_constraint")


def test_a_function_traced_outside_of_a_mesh_and_called_inside_follows_the_mesh():
    inner = jax.jit(lambda x: with_sharding(x, "BT"))
    outer = jax.jit(lambda x: jax.checkpoint(inner)(x))
    assert constraints(inner) == constraints(outer) == 0
    with use_abstract_mesh(mesh(2, 2, 1, 2)):
        assert constraints(inner) == constraints(outer) == 1
        assert "('data', 'fsdp')" in str(outer.trace(X).jaxpr)
    with use_abstract_mesh(mesh(1, 8, 1, 1)):
        assert constraints(outer) == 1
    assert constraints(inner) == constraints(outer) == 0


def test_a_layer_is_traced_for_the_mesh_that_it_is_called_on():
    layer = TTTLinear(32, 4, rngs=nnx.Rngs(0))
    call = jax.jit(lambda x: layer(x))
    assert constraints(call) == 0
    with use_abstract_mesh(mesh(2, 1, 2, 2)):
        assert constraints(call) > 0
        assert "shard_map" in str(call.trace(X).jaxpr)
    assert constraints(call) == 0


@pytest.mark.parametrize(
    "other",
    [
        mesh(1, 1, 1, 1),
        mesh(4, 2, axes=("data", "model")),
        mesh(2, 2, 2, 1, kind=AxisType.Explicit),
        mesh(2, 2, 2, 1, kind=AxisType.Manual),
    ],
    ids=["one device", "other axes", "explicit axes", "within a shard_map of somebody else"],
)
def test_on_a_mesh_that_leaves_no_choice_nothing_changes(other):
    double = lambda x: 2 * x
    with use_abstract_mesh(other):
        assert num_shards("B") == num_shards("H") == 1
        assert mesh_axes("BT") == ()
        assert each_device(double, ("B",), "B") is double
        assert constraints(jax.jit(lambda x: with_sharding(x, "BTF"))) == 0
