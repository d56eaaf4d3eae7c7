"""Layers that read in other orders, and what attention and TTT leave out, or are given, when asked."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.mixers import test_dropin
from tests.mixers.test_dropin import _as_a_user  # noqa: F401
from tttlm.errors import InputError
from tttlm.layers import Attention, Bidirectional, Mamba, TTTLinear, scan_image

WIDTH, TIME = 8, 6
LARGE = {"kernel_init": nnx.initializers.normal(0.4)}  # so that what is learned and seen shows in the output
LAYERS = {
    "ttt_linear": lambda **o: TTTLinear(WIDTH, 2, mini_batch_size=4, rngs=nnx.Rngs(0), **LARGE, **o),
    "attention": lambda **o: Attention(WIDTH, 2, max_length=TIME, rngs=nnx.Rngs(0), **LARGE, **o),
    "mamba": lambda **o: Mamba(WIDTH, state_size=2, rngs=nnx.Rngs(0), **o),
}


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*shape, WIDTH)), jnp.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_call_is_given_is_reversed_where_the_pass_is():
    """The second pass is that of the reversed sequence with everything that belongs to its tokens."""
    layer, x = LAYERS["attention"](), inputs(2, TIME)
    rng = np.random.default_rng(3)
    given = {
        "positions": jnp.asarray(rng.integers(0, 9, (2, TIME))),
        "attention_mask": jnp.asarray(rng.random((2, TIME, TIME)) < 0.6) | jnp.eye(TIME, dtype=bool),
        "mask": jnp.asarray([[False, True, True, True, False, True]] * 2),
    }
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]] * 2)
    turned = {name: a[:, ::-1] for name, a in given.items()}
    turned["attention_mask"] = turned["attention_mask"][..., ::-1]
    y = Bidirectional(layer)(x, ids, **given)
    close(y, layer(x, ids, **given) + layer(x[:, ::-1], ids[:, ::-1], **turned)[:, ::-1])


def test_arguments_that_the_layer_does_not_take_are_refused():
    both, x = Bidirectional(LAYERS["mamba"]()), inputs(1, TIME)
    with pytest.raises(InputError, match="positions must be None: Mamba does not take it"):
        both(x, positions=jnp.arange(TIME)[None])
    with pytest.raises(InputError, match="attention_mask must be None: Mamba does not"):
        both(x, attention_mask=jnp.tri(TIME, dtype=bool))
    with pytest.raises(InputError, match="inner_learning_rate_multiplier must be None: Mamba does not"):
        scan_image(both.layer, x[None], inner_learning_rate_multiplier=0.0)


MARKS = {"attention": pytest.mark.long, "mamba": pytest.mark.long}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in test_dropin.LAYERS]
)
def test_every_mixer_reads_forward_and_backward(name):
    """A reversed sequence gives reversed outputs, and padding is left out of both passes."""
    layer, x = test_dropin.build(name, kernel_init=nnx.initializers.normal(0.4)), inputs(1, TIME)
    rng = np.random.default_rng(2)
    for parameter in jax.tree.leaves(nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        if not np.any(parameter[...]):  # with which a new layer learns nothing
            parameter.set_value(jnp.asarray(0.3 * rng.normal(size=parameter.shape), parameter.dtype))
    both, halves = Bidirectional(layer), Bidirectional(layer, merge="concatenate")
    y, split = both(x), halves(x)
    close(both(x[:, ::-1]), y[:, ::-1])
    close(split[..., :WIDTH], layer(x))
    close(split[..., :WIDTH] + split[..., WIDTH:], y)
    assert float(jnp.max(jnp.abs(y[:, 0] - 2 * layer(x)[:, 0]))) > 1e-4  # what comes later reaches the first token
    padded = jnp.full(x.shape, jnp.nan).at[:, 1:5].set(x[:, :4])
    alone = both(x[:, :4])
    close(both(padded, mask=jnp.asarray([[False, *[True] * 4, False]]))[:, 1:5], alone)
    close(both(padded[:, 1:], lengths=jnp.asarray([4]))[:, :4], alone)


@pytest.mark.long
def test_both_passes_are_read_out_without_learning():
    layer, x = LAYERS["ttt_linear"](), inputs(1, TIME)
    y = Bidirectional(layer)(x, inner_learning_rate_multiplier=0.0)
    once, back = (layer(a, inner_learning_rate_multiplier=0.0) for a in (x, x[:, ::-1]))
    close(y, once + back[:, ::-1])


@pytest.mark.long
def test_a_transposed_image_gives_the_transposed_result():
    layer, image = LAYERS["mamba"](), inputs(2, 2, 3)
    y = scan_image(layer, image)
    assert y.shape == image.shape
    close(scan_image(layer, image.swapaxes(1, 2)), y.swapaxes(1, 2))


@pytest.mark.long
def test_padding_around_an_image_is_left_out_of_every_scan():
    layer, image = Bidirectional(LAYERS["mamba"]()), inputs(1, 2, 3)
    padded = jnp.full((1, 4, 4, WIDTH), jnp.nan).at[:, 1:3, :3].set(image)
    real = jnp.zeros((1, 4, 4), bool).at[:, 1:3, :3].set(True)
    close(scan_image(layer, padded, mask=real)[:, 1:3, :3], scan_image(layer, image))


@pytest.mark.usefixtures("_as_a_user")
def test_a_mask_of_another_image_is_refused():
    with pytest.raises(InputError, match=r"mask must have shape \(1, 2, 3\) .* got \(1, 3, 2\)"):
        scan_image(LAYERS["mamba"](), inputs(1, 2, 3), mask=jnp.ones((1, 3, 2), bool))


def test_attention_that_is_not_causal_sees_all_of_its_document():
    layer, x = LAYERS["attention"](causal=False, rope_theta=None), inputs(1, TIME)
    order = np.random.default_rng(2).permutation(TIME)
    close(layer(x[:, order]), layer(x)[:, order])  # a function of the set
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    close(layer(x, ids)[:, :3], layer(x[:, :3]))
    with pytest.raises(InputError, match="causal=False"):
        layer.init_state(1)


def test_an_attention_mask_says_what_a_query_attends_to():
    layer, causal, x = LAYERS["attention"](causal=False), LAYERS["attention"](), inputs(2, TIME)
    earlier = jnp.tri(TIME, dtype=bool)
    close(layer(x, attention_mask=earlier), causal(x))
    ids = jnp.asarray([[1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 5, 5]])
    same = ids[:, :, None] == ids[:, None, :]
    close(layer(x, attention_mask=same), layer(x, ids))
    close(causal(x, attention_mask=same), causal(x, ids))
    narrow = LAYERS["attention"](sliding_window=2)
    close(causal(x, attention_mask=~jnp.tri(TIME, k=-2, dtype=bool)), narrow(x))
    nothing = layer(x, attention_mask=earlier & (jnp.arange(TIME) != 3)[:, None])
    assert not np.any(nothing[:, 3])
    assert np.all(np.any(np.asarray(nothing)[:, 4:] != 0, axis=-1))


@pytest.mark.slow
def test_an_attention_mask_and_positions_follow_their_tokens_past_padding():
    layer, x = LAYERS["attention"](causal=False), inputs(1, TIME)
    rng = np.random.default_rng(3)
    allowed, positions = jnp.asarray(rng.random((1, 4, 4)) < 0.6), jnp.asarray(rng.permutation(4)[None])
    alone = layer(x[:, :4], attention_mask=allowed, positions=positions)
    real = jnp.asarray([[False, True, True, False, True, True]])
    where = np.flatnonzero(real[0])
    wide = jnp.full((1, TIME, TIME), True).at[:, where[:, None], where].set(allowed)
    padded = jnp.full(x.shape, jnp.nan).at[:, where].set(x[:, :4])
    spread = jnp.full((1, TIME), 9).at[:, where].set(positions)
    y = layer(padded, mask=real, attention_mask=wide, positions=spread)
    close(y[:, where], alone)
    close(layer(x[:, :4], attention_mask=allowed[0], positions=positions), alone)


@pytest.mark.long
@pytest.mark.parametrize("name", ["attention", pytest.param("ttt_linear", marks=pytest.mark.slow)])
def test_positions_may_be_given(name):
    """Those that a layer counts change nothing; others do, the same however the sequence is cut."""
    layer, x = LAYERS[name](), inputs(1, TIME)
    counted = jnp.arange(TIME)[None] % (4 if name == "ttt_linear" else TIME)
    close(layer(x, positions=counted), layer(x))
    given = jnp.asarray([[0, 1, 5, 9, 2, 2]])
    y, state = layer(x, positions=given), layer.init_state(1)
    assert float(jnp.max(jnp.abs(y - layer(x)))) > 1e-5
    first, state = layer.extend(x[:, :3], state, positions=given[:, :3])
    second, _ = layer.extend(x[:, 3:], state, positions=given[:, 3:])
    close(jnp.concatenate([first, second], axis=1), y)
    if name == "attention":
        close(layer(x, positions=given + 7), y)  # attention sees differences of positions


def precisions(jaxpr):
    """The precision of every matrix product, those within loops and derivatives included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from precisions(inner)


@pytest.mark.parametrize("name", LAYERS)
def test_all_matrix_products_have_the_precision_of_the_layer(name):
    x, highest = inputs(1, TIME), (jax.lax.Precision.HIGHEST,) * 2
    for precision in ("highest", jax.lax.Precision.HIGHEST, None):
        layer = LAYERS[name](precision=precision)
        gradient = jax.make_jaxpr(jax.grad(lambda x, layer=layer: jnp.sum(layer(x))))(x)
        found = list(precisions(gradient.jaxpr))
        assert len(found) > 5
        assert set(found) == ({None} if precision is None else {highest})
    with pytest.raises(InputError, match=r"precision must be None or a name of .* got 'exact'"):
        LAYERS[name](precision="exact")


@pytest.mark.long
def test_without_rotation_there_are_no_positions():
    layer, x = LAYERS["attention"](rope_theta=None), inputs(1, 3)
    swapped = x[:, jnp.asarray([1, 0, 2])]
    close(layer(swapped)[:, 2], layer(x)[:, 2])
    turned = LAYERS["attention"]()
    assert float(jnp.max(jnp.abs(turned(swapped)[:, 2] - turned(x)[:, 2]))) > 1e-5
    ttt = LAYERS["ttt_linear"](rope_theta=None)
    assert float(jnp.max(jnp.abs(ttt(x) - LAYERS["ttt_linear"]()(x)))) > 1e-5


@pytest.mark.long
def test_the_inner_model_is_read_out_without_learning():
    layer, x = LAYERS["ttt_linear"](), inputs(1, TIME)
    _, state = layer.extend(x[:, :4], layer.init_state(1))
    y, after = layer.extend(x, state, inner_learning_rate_multiplier=0.0)
    for a, b in zip(after.inner.weights, state.inner.weights, strict=True):
        np.testing.assert_array_equal(a.kernel, b.kernel)
    learned, _ = layer.extend(x, state)
    assert float(jnp.max(jnp.abs(y - learned))) > 1e-4


def test_inner_weights_have_an_initializer_of_their_own():
    layer = LAYERS["ttt_linear"](inner_kernel_init=nnx.initializers.constant(0.5))
    assert np.all(layer.inner[0].kernel[...] == 0.5)
    assert np.std(layer.q_proj.kernel[...]) > 0
