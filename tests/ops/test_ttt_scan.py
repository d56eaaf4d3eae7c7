"""The dual form computes what the definition says: outputs, state, and gradients with respect to everything."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tttlm.ops.ttt import InnerLayer, InnerNorm, LearnerInputs, init_learner_state, learn, published
from tttlm.ops.ttt.model import activation, activation_gradient, layer_norm, loss_gradient

TOLERANCE = 1e-9


def learner_of(scale, weights, norm):
    """The description of these weights: MLPs of any depth, with or without the norm."""
    hidden = tuple(layer.kernel.shape[-1] for layer in weights[:-1])
    return published.ttt(hidden, len(scale), norm=norm is not None, use_bias=weights[0].bias is not None)


def ttt(q, k, v, rates, scale, weights, norm, **options):
    learner = learner_of(scale, weights, norm)
    return learn(learner, LearnerInputs(q, k, v, rates), weights, slow=norm, position_scale=scale, **options)


def initial(args, batch):
    head_dim = args[0].shape[-1]
    return init_learner_state(learner_of(*args[4:]), args[5], batch, head_dim, head_dim)


def carried_in(state, weights, gradients):
    return state._replace(weights=weights, pending=state.pending._replace(gradients=gradients))


def carried_of(state):
    return state.weights, state.pending.gradients


@pytest.fixture(autouse=True)
def in_float64(x64):
    return


def inputs(
    seed: int, batch: int, time: int, num_heads: int, head_dim: int, mini_batch: int, depth: int, bare: bool = False
):
    """Random arguments of `ttt`; every inner layer but the last is wider than the head; `bare`: no norm."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    widths = [head_dim, *[head_dim + 3 * (i + 1) for i in range(depth - 1)], head_dim]
    weights = tuple(
        InnerLayer(normal(num_heads, i, o) / np.sqrt(i), 0.3 * normal(num_heads, o)) for i, o in pairwise(widths)
    )
    tokens = tuple(normal(batch, time, num_heads, head_dim) for _ in range(3))
    rates = jnp.asarray(rng.uniform(size=(batch, time, num_heads))) / head_dim
    scale = jnp.asarray(rng.uniform(0, 1, size=mini_batch))
    norm = InnerNorm(1 + 0.2 * normal(num_heads, head_dim), 0.2 * normal(num_heads, head_dim))
    if bare:
        norm, weights = None, tuple(layer._replace(bias=None) for layer in weights)
    return *tokens, rates, scale, weights, norm


def some_segments(seed: int, batch: int, time: int):
    """Documents and padding of random lengths, starting anywhere, ids not unique."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(batch):
        lengths = rng.integers(1, max(2, time // 2), size=time)
        rows.append(np.repeat(rng.integers(0, 4, size=time), lengths)[:time])
    return jnp.asarray(np.stack(rows), jnp.int32)


def state_within(seed: int, args, mini_batch: int):
    """A state in which every row stands somewhere else within a mini-batch."""
    _, state = ttt(*args, implementation="reference")
    rng = np.random.default_rng(seed)
    offset = jnp.asarray(rng.integers(0, mini_batch, size=state.offset.shape), jnp.int32)
    jitter = jax.tree.map(lambda w: 0.1 * jnp.asarray(rng.normal(size=w.shape)), state.weights)
    return carried_in(state, state.weights, jitter)._replace(offset=offset)


def close(a, b, tolerance=TOLERANCE):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            x, y, rtol=tolerance, atol=tolerance * max(1.0, float(jnp.max(jnp.abs(y), initial=0)))
        )


def everything(implementation, args, state, segment_ids, **options):
    """Outputs at real tokens, the state after them, and the gradients of a function of both."""

    def run(args, carried):
        start = None if state is None else carried_in(state, *carried)
        out, after = ttt(*args, state=start, segment_ids=segment_ids, implementation=implementation, **options)
        if segment_ids is not None:
            out = jnp.where((segment_ids != 0)[..., None, None], out, 0)
        score = jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(w)) for w in jax.tree.leaves(carried_of(after)))
        return score, (out, after)

    carried = None if state is None else carried_of(state)
    (_, results), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(args, carried)
    return results, gradients


@pytest.mark.long
@given(
    seed=st.integers(0, 2**16),
    time=st.integers(1, 40),
    head_dim=st.integers(4, 32),
    mini_batch=st.sampled_from([1, 4, 16, 64]),
    depth=st.integers(1, 2),
    carried=st.booleans(),
    packed=st.booleans(),
    bare=st.booleans(),
    remat=st.integers(1, 3),
)
@settings(max_examples=4)
def test_dual_is_the_definition(seed, time, head_dim, mini_batch, depth, carried, packed, bare, remat):
    args = inputs(seed, 2, time, 2, head_dim, mini_batch, depth, bare)
    state = state_within(seed, args, mini_batch) if carried else None
    segment_ids = some_segments(seed, 2, time) if packed else None
    got = everything("dual", args, state, segment_ids, remat_chunks=remat)
    close(got, everything("reference", args, state, segment_ids))


@pytest.mark.parametrize("carried", [False, True])
def test_remat_of_several_mini_batches_keeps_fewer_inner_weights(carried):
    args = inputs(0, 1, 24, 1, 6, 2, 1)
    state = initial(args, 1) if carried else None

    def kept(remat):
        run = lambda *tokens: ttt(*tokens, *args[3:], state=state, remat_chunks=remat)[0]
        saved = jax.eval_shape(lambda *tokens: jax.vjp(run, *tokens)[1], *args[:3])
        weights = [x.shape for x in jax.tree.leaves(saved) if x.shape[-2:] == (6, 6) and x.ndim == 5]
        return sum(shape[0] for shape in weights)

    count = 13 if carried else 12  # mini-batches, one more where they may start anywhere
    each = 2 if carried else 1  # weights and gradients
    assert kept(1) == each * count
    assert kept(4) == each * (count // 4 + count % 4)


@pytest.mark.parametrize(
    ("head_dim", "mini_batch", "depth", "time"), [(96, 16, 1, 48), pytest.param(96, 64, 2, 70, marks=pytest.mark.slow)]
)
def test_dual_is_the_definition_at_published_head_widths(head_dim, mini_batch, depth, time):
    args = inputs(0, 1, time, 2, head_dim, mini_batch, depth)
    close(everything("dual", args, None, None), everything("reference", args, None, None))


@pytest.mark.long
def test_without_norm_bias_and_start_it_is_linear_attention():
    """Theorem 1, with documents: `z_t = sum_{s <= t} v_s (k_s . q_t)`, and the state is the sum of `k v^T`."""
    time, head_dim = 40, 8
    q, k, v, *_ = inputs(0, 2, time, 3, head_dim, time, 1)
    weights = (InnerLayer(jnp.zeros((3, head_dim, head_dim)), None),)
    ids = jnp.asarray([[1] * 25 + [2] * 15, [3] * 40])
    run = lambda time, **o: ttt(
        q[:, :time], k[:, :time], v[:, :time], jnp.ones((2, time, 3)), jnp.ones(40), weights, None, **o
    )
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    for segment_ids in (None, ids):
        sees = jnp.tril(jnp.ones((time, time), bool))[None]
        if segment_ids is not None:
            sees = sees & (ids[:, :, None] == ids[:, None, :])
        expected = jnp.einsum("bhts,bshk->bthk", jnp.where(sees[:, None], scores, 0), v)
        for implementation in ("dual", "reference"):
            out, _ = run(time, segment_ids=segment_ids, implementation=implementation)
            close(out, expected)
    _, state = run(39)  # the mini-batch is still open: nothing has been learned yet, all is in the gradients
    close(state.pending.gradients[0].kernel, -jnp.einsum("bthi,btho->bhio", k[:, :39], v[:, :39]))


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.sampled_from([1, 5, 9]), min_size=2, max_size=6))
def test_any_cut_gives_the_same_outputs_and_state(packed, seed, cuts):
    time, padded = sum(cuts), 54  # the whole always has one shape, so that it is compiled once
    args = inputs(seed, 2, padded, 2, 8, 4, 1)
    segment_ids = some_segments(seed, 2, padded) if packed else None
    extend = jax.jit(lambda tokens, rest, state, ids: ttt(*tokens, *rest, state=state, segment_ids=ids))
    whole, _ = jax.jit(lambda args, ids: ttt(*args, segment_ids=ids, implementation="reference"))(args, segment_ids)
    outputs, state, start = [], initial(args, 2), 0
    for length in cuts:
        piece = slice(start, start + length)
        ids = None if segment_ids is None else segment_ids[:, piece]
        out, state = extend([a[:, piece] for a in args[:4]], args[4:], state, ids)
        outputs.append(out)
        start += length
    outputs, whole = jnp.concatenate(outputs, axis=1), whole[:, :time]
    if segment_ids is not None:
        real = (segment_ids[:, :time] != 0)[..., None, None]
        outputs, whole = jnp.where(real, outputs, 0), jnp.where(real, whole, 0)
    close(outputs, whole)


@given(seed=st.integers(0, 2**16), head_dim=st.sampled_from([8, 64]), spread=st.floats(1e-3, 1e3))
def test_closed_form_gradients_are_those_of_autodiff(seed, head_dim, spread):
    rng = np.random.default_rng(seed)
    z, target, scale, bias = (jnp.asarray(rng.normal(size=head_dim)) for _ in range(4))

    @jax.jit
    def compare(z, target, scale, bias):
        gradient = jax.grad(lambda z: 0.5 * jnp.sum((layer_norm(z, scale, bias, 1e-6) - target) ** 2))(z)
        size = jnp.max(jnp.abs(gradient))
        closed = loss_gradient(z, target, scale, bias, 1e-6)
        return (closed / size, activation_gradient(z)), (gradient / size, jax.vmap(jax.grad(activation))(z))

    close(*compare(spread * z, target, scale, bias))


def test_a_step_reduces_the_inner_loss():
    """The point of it all: after learning a mini-batch the inner model reconstructs it better."""
    _, k, v, _, _, weights, norm = inputs(3, 1, 16, 2, 16, 16, 2)
    rates, scale = jnp.full((1, 16, 2), 0.01), jnp.ones(16)
    losses = []
    for repeats in (1, 8):
        again = lambda a, n=repeats: jnp.tile(a, (1, n, 1, 1))
        out, _ = ttt(again(k), again(k), again(v), jnp.tile(rates, (1, repeats, 1)), scale, weights, norm)
        losses.append(float(jnp.mean((out[:, -1] - v[:, -1]) ** 2)))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.long
def test_from_bfloat16_it_computes_in_float32_keeps_the_state_in_it_and_rounds_the_outputs_alone():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), inputs(0, 1, 20, 2, 8, 16, 1))
    out, state = ttt(*narrow)
    exact, _ = ttt(*jax.tree.map(lambda a: a.astype(jnp.float32), narrow))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)
    assert {w.dtype for w in jax.tree.leaves(carried_of(state))} == {jnp.dtype("float32")}


def test_what_does_not_fit_is_named():
    q, k, v, rates, scale, weights, norm = inputs(0, 1, 8, 2, 8, 4, 2)
    with pytest.raises(ValueError, match="implementation must be one of"):
        ttt(q, k, v, rates, scale, weights, norm, implementation="fast")
    with pytest.raises(ValueError, match=r"weights\[1\]\.kernel must have shape"):
        ttt(q, k, v, rates, scale, (weights[0], weights[1]._replace(kernel=weights[1].kernel[:1])), norm)
