"""Layers ask JAX's own context for the mesh, so that JAX traces again what was traced on another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from tttlm.layers import Attention, Mamba, Mamba2, TTTLinear
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


LAYERS = {
    "ttt": lambda rngs: TTTLinear(32, 4, mini_batch_size=8, share_qk=True, gate=True, rngs=rngs),
    "attention": lambda rngs: Attention(32, 4, max_length=16, rngs=rngs),
    "sliding_attention": lambda rngs: Attention(32, 4, sliding_window=6, rngs=rngs),
    "mamba": lambda rngs: Mamba(32, rngs=rngs),
    "mamba2": lambda rngs: Mamba2(32, head_dim=16, state_size=8, rngs=rngs),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("of_x", "of_kernel"), [(P("data"), P()), (P("data", None, "model"), P(None, "model"))])
def test_a_layer_works_on_a_mesh_of_explicit_axes(name, of_x, of_kernel):
    """Forward, gradients and `extend`, over a data axis and a tensor axis: what is refused is refused while tracing."""
    explicit = mesh(4, 2, kind=AxisType.Explicit, axes=("data", "model"))
    graph, parameters = nnx.split(LAYERS[name](nnx.Rngs(0)))

    def sharded(a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(explicit, spec))

    def score(parameters, x, ids):
        layer = nnx.merge(graph, parameters)
        whole = layer(x, ids)
        pieces, state = layer.extend(x, layer.init_state(x.shape[0]), ids)
        more, after = layer.extend(x[:, :1], state)
        assert jax.typeof(whole).sharding.spec == jax.typeof(x).sharding.spec
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        return jnp.sum(whole) + jnp.sum(pieces) + jnp.sum(more)

    with use_abstract_mesh(explicit):
        x, ids = sharded(X, of_x), sharded(jax.ShapeDtypeStruct(X.shape[:2], jnp.int32), P("data"))
        parameters = jax.tree.map(lambda p: sharded(p, of_kernel if p.ndim == 2 else P()), parameters)
        gradients = jax.jit(jax.grad(score, argnums=(0, 1))).trace(parameters, x, ids).out_info
    found = jax.tree.map(lambda g: g.shape, gradients)
    assert found == jax.tree.map(lambda a: a.shape, (parameters, x))


@pytest.mark.parametrize(("name", "time"), [*((name, 16) for name in LAYERS), ("attention", 300)])
def test_a_layer_works_within_a_shard_map_that_keeps_count_of_what_varies(name, time):
    """`check_vma=True`, the default: forward, gradients and `extend` over a data axis."""
    auto = mesh(4, 2, axes=("data", "model"))
    graph, parameters = nnx.split(LAYERS[name](nnx.Rngs(0)))
    x, ids = jax.ShapeDtypeStruct((8, time, 32), jnp.float32), jax.ShapeDtypeStruct((8, time), jnp.int32)

    def outputs(parameters, x, ids):
        layer = nnx.merge(graph, parameters)
        piece, _ = layer.extend(x[:, :8], layer.init_state(x.shape[0]), ids[:, :8])
        return layer(x, ids).at[:, :8].add(piece)

    sharded = jax.shard_map(outputs, mesh=auto, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    score = lambda parameters, x, ids: jnp.sum(sharded(parameters, x, ids))
    gradients = jax.jit(jax.grad(score, argnums=(0, 1))).trace(parameters, x, ids).out_info
    assert jax.tree.map(lambda g: g.shape, gradients) == jax.tree.map(lambda a: a.shape, (parameters, x))


def test_gradients_within_a_shard_map_are_those_without():
    layer = TTTLinear(32, 4, mini_batch_size=8, share_qk=True, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 16, 32))
    function = lambda parameters, x: nnx.merge(graph, parameters)(x)
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    sharded = jax.shard_map(function, mesh=one, in_specs=(P(), P("data")), out_specs=P("data"))
    within, without = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p, x)))))(parameters) for f in (sharded, function)
    )
    for a, b in zip(jax.tree.leaves(within), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
