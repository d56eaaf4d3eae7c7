"""Layers in other people's code: what a caller may hand in, how strict JAX may be, and every kind of derivative.

Eager and tiny: nearly all of the time would go into compiling.
"""

from dataclasses import fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import summary
from jax import export
from jaxtyping import config as jaxtyping_config

from tttlm.errors import InputError
from tttlm.layers import TTTMLP, Attention, Mamba, Mamba2, MemoryAsContext, MemoryAsGate, Titans, TTTLinear
from tttlm.mixers import mixer_names, registered

WIDTH, TIME = 8, 6
LAYERS = {
    "ttt_linear": lambda **o: TTTLinear(WIDTH, 2, mini_batch_size=4, share_qk=True, gate=True, **o),
    "ttt_mlp": lambda **o: TTTMLP(WIDTH, 2, mini_batch_size=4, **o),
    "attention": lambda **o: Attention(WIDTH, 2, max_length=TIME, **o),
    "sliding_attention": lambda **o: Attention(WIDTH, 2, sliding_window=3, qk_norm=True, **o),
    "mamba": lambda **o: Mamba(WIDTH, state_size=2, **o),
    "mamba2": lambda **o: Mamba2(WIDTH, state_size=2, head_dim=4, **o),
}
CHUNKS = {"chunk_size": 4, "local_chunk_size": 2, "local_shard_size": 4, "window": 3}


def published(mixer):
    """The layer of a published learner with chunks that are shorter than the sequences here."""
    sizes = {name: size for name, size in CHUNKS.items() if name in {field.name for field in fields(mixer.Config)}}
    return lambda *, implementation=None, **o: mixer.layer(
        WIDTH, mixer.layer.heads or 2, mixer.Config(**sizes, implementation=implementation), **o
    )


def hybrid(kind):
    def build(*, implementation=None, **o):
        memory = Titans(WIDTH, 2, Titans.Config(chunk_size=4, implementation=implementation), **o)
        return kind(memory, Attention(WIDTH, 2, sliding_window=3, **o))

    return build


LAYERS |= {"titans_gate": hybrid(MemoryAsGate), "titans_context": hybrid(MemoryAsContext)}
# All that are registered: what is new is tested as soon as it is there.
LAYERS |= {name: published(registered(name)) for name in mixer_names() if hasattr(registered(name), "layer")}
ALWAYS = ("ttt_mlp", "attention", "mamba2")  # one of each kind; the others are slow tests


def slow_unless(names):
    marks = {name: () if name in names else pytest.mark.slow for name in LAYERS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in LAYERS])


each = slow_unless(ALWAYS)
quickly_each = slow_unless((*ALWAYS, "gated_deltanet"))  # a published learner compiles longer


def test_every_mixer_of_the_library_is_in_the_table():
    assert set(LAYERS) == {name for name in mixer_names() if registered(name).__module__.startswith("tttlm.")}


def build(name, **options):
    return LAYERS[name](rngs=nnx.Rngs(0), **options)


def inputs(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*shape, WIDTH)), dtype)


@pytest.fixture
def _as_a_user():
    """Without the checks of shapes that tests add to the signatures."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def described(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.long
@each
def test_leading_dimensions_are_those_of_the_caller(name):
    layer, x = build(name), inputs(2, 2, TIME)
    lengths = jnp.asarray([[6, 2], [0, 3]])
    y, state = layer.extend(x, layer.init_state((2, 2)), lengths=lengths)
    flat, flat_state = layer.extend(x.reshape(4, TIME, WIDTH), layer.init_state(4), lengths=lengths.reshape(4))
    np.testing.assert_array_equal(y.reshape(flat.shape), flat)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), state, flat_state)
    alone, alone_state = layer.extend(x[0, 0], layer.init_state(()))
    np.testing.assert_allclose(alone, y[0, 0], rtol=1e-5, atol=1e-6)
    assert alone_state.document.shape == ()


@quickly_each
def test_of_nothing_comes_nothing(name):
    layer = build(name)
    _, state = layer.extend(inputs(2, 3), layer.init_state(2))
    y, after = layer.extend(inputs(2, 0), state)
    assert y.shape == (2, 0, WIDTH)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    y, after = layer.extend(inputs(0, TIME), layer.init_state(0))
    assert y.shape == (0, TIME, WIDTH)
    assert described(after) == described(layer.init_state(0))


@quickly_each
@pytest.mark.usefixtures("_as_a_user")
def test_what_does_not_fit_is_refused_in_one_line(name):
    layer, x = build(name), inputs(2, TIME)
    calls = {
        r"x must be floats \[\.\.\., T, 8\], got float32 \(8,\)": lambda: layer(x[0, 0]),
        r"x must be floats \[\.\.\., T, 8\], got float32 \(2, 6, 7\)": lambda: layer(x[..., 1:]),
        r"x must be floats \[\.\.\., T, 8\], got int32": lambda: layer(x.astype(jnp.int32)),
        r"state must be of leading dimensions \(2,\) .* got \(3,\)": lambda: layer.extend(x, layer.init_state(3)),
        r"segment_ids must have shape \(2, 6\) .* got \(2, 5\)": lambda: layer(x, jnp.ones((2, 5), jnp.int32)),
        r"segment_ids must be integers.* got float32": lambda: layer(x, jnp.ones((2, 6))),
        r"lengths must have shape \(2,\) .* got \(3,\)": lambda: layer(x, lengths=jnp.ones(3, jnp.int32)),
        r"mask must have shape \(2, 6\) .* got \(6,\)": lambda: layer(x, mask=jnp.ones(6, bool)),
        r"give one of them": lambda: layer(x, mask=jnp.ones((2, 6), bool), lengths=jnp.ones(2, jnp.int32)),
        r"implementation must be None or one of .* got 'nonsense'": lambda: build(name, implementation="nonsense"),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_as_a_user")
def test_positions_and_attention_masks_that_do_not_fit_are_refused():
    layer, x = build("attention"), inputs(2, TIME)
    for wrong in (jnp.arange(TIME), jnp.ones((2, TIME))):
        for one in (layer, build("ttt_linear")):
            with pytest.raises(InputError, match="positions must"):
                one(x, positions=wrong)
    for wrong in (jnp.ones((TIME, TIME)), jnp.ones((TIME, TIME + 1), bool), jnp.ones((3, TIME, TIME), bool)):
        with pytest.raises(InputError, match="attention_mask must"):
            layer(x, attention_mask=wrong)


@pytest.mark.parametrize(
    ("option", "layer"),
    [("mini_batch_size", TTTLinear), ("remat_mini_batches", TTTMLP), ("num_kv_heads", Attention)],
)
def test_a_count_below_one_is_refused_by_its_name(option, layer):
    with pytest.raises(InputError, match=f"{option} must be at least 1, got 0"):
        layer(WIDTH, 2, **{option: 0}, rngs=nnx.Rngs(0))


@pytest.mark.long
@each
@pytest.mark.usefixtures("_as_a_user")
def test_the_dtypes_of_a_state_stay_whatever_comes(name, x64):
    layer = build(name)
    x, ids = np.asarray(inputs(2, TIME), np.float64), np.asarray([[1, 1, 1, 2, 2, 0]] * 2)
    assert ids.dtype == np.int64
    before = layer.init_state(2)
    y, after = layer.extend(x, before, ids)
    assert y.dtype == jnp.float64
    assert described(after) == described(before)
    narrow, _ = layer.extend(x.astype(np.float32), before, ids.astype(np.int32))
    real = (ids != 0)[..., None]
    np.testing.assert_allclose(narrow * real, y * real, rtol=1e-3, atol=1e-5)


@quickly_each
def test_a_fresh_state_can_be_donated(name):
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(build(name).init_state(2)) if a.size]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.long
@each
def test_strict_promotion_is_for_the_callers_code(name):
    layer, x = build(name, dtype=jnp.bfloat16), inputs(2, TIME, dtype=jnp.bfloat16)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0]] * 2)
    expected, _ = layer.extend(x, layer.init_state(2), ids)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        y, _ = layer.extend(x, layer.init_state(2), ids)
    np.testing.assert_array_equal(y, expected)


@pytest.fixture
def _methods_put_back(monkeypatch):
    """Where a table fails, Flax leaves its own classes changed."""
    overwrite, before = summary._overwrite_methods, {}

    def noting(methods):
        for owner, name in methods:
            before.setdefault((owner, name), getattr(owner, name))
        overwrite(methods)

    monkeypatch.setattr(summary, "_overwrite_methods", noting)
    yield
    overwrite(before)


@pytest.mark.long
@quickly_each
@pytest.mark.usefixtures("_as_a_user", "_methods_put_back")
def test_a_table_lists_the_parts_of_a_layer(name):
    layer = build(name)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    table = nnx.tabulate(layer, inputs(1, TIME), ids, console_kwargs={"force_terminal": False, "width": 200})
    assert f"{type(layer).__name__} Summary" in table
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert f"Total Parameters: {parameters:,} " in table


class Pair(NamedTuple):
    one: jax.Array


class TakesPairs(nnx.Module):
    def extend(self, x: jax.Array, state: Pair) -> jax.Array:
        return x + state.one


@pytest.mark.xfail(
    raises=TypeError, strict=True, reason="flax.nnx.summary takes a named tuple for a list: docs/layers.md"
)
@pytest.mark.usefixtures("_methods_put_back")
def test_a_table_of_a_method_that_takes_a_state():
    """With any module; once Flax can, the page says what is no longer so."""
    nnx.tabulate(TakesPairs(), jnp.ones(2), Pair(jnp.ones(2)), method="extend")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_forward_and_backward_agree(name, x64):
    """`<w, J v> = <J^T w, v>`, and finite differences agree."""
    layer = build(name, dtype=jnp.float64, param_dtype=jnp.float64)
    x, v, w = (jnp.asarray(np.random.default_rng(i).normal(size=(1, TIME, WIDTH))) for i in range(3))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    run = lambda x: layer(x, ids)
    _, push = jax.linearize(run, x)
    _, pull = jax.vjp(run, x)
    np.testing.assert_allclose(jnp.vdot(w, push(v)), jnp.vdot(pull(w)[0], v), rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(run, (x,), (v,))[1], push(v), rtol=1e-9, atol=1e-12)
    step = 1e-5
    np.testing.assert_allclose(push(v), (run(x + step * v) - run(x - step * v)) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_differences_of_the_first(name, x64):
    """Reverse over reverse and forward over reverse; of attention at a length that is computed block by block."""
    layer = build(name, dtype=jnp.float64, param_dtype=jnp.float64)
    time = 260 if name == "attention" else TIME
    x, v = (jnp.asarray(np.random.default_rng(i).normal(size=(1, time, WIDTH))) for i in range(2))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(3 * layer(x)))))
    step = 1e-5
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    assert float(jnp.max(jnp.abs(expected))) > 1e-6
    scale = float(jnp.max(jnp.abs(expected)))
    for product in (
        jax.jit(jax.grad(lambda x: jnp.vdot(gradient(x), v)))(x),
        jax.jit(lambda x: jax.jvp(gradient, (x,), (v,))[1])(x),
    ):
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.long
@each
@pytest.mark.usefixtures("_as_a_user")
def test_a_batch_may_be_a_symbol_of_an_exported_program(name):
    layer = build(name)
    (batch,) = export.symbolic_shape("b")
    program = export.export(jax.jit(lambda x: layer(x)))(jax.ShapeDtypeStruct((batch, TIME, WIDTH), jnp.float32))
    x = inputs(3, TIME)
    np.testing.assert_allclose(program.call(x), layer(x), rtol=1e-4, atol=1e-5)
