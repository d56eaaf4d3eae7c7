"""What holds for every sequence layer: any cut gives the same, documents keep to themselves, states are plain data.

All in float64 and with jitted functions of few shapes, because nearly all of the time goes into compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mixers.learners import LAYERS as LEARNERS
from tttlm.layers import TTTMLP, Attention, Mamba, Mamba2, TTTLinear

WIDTH, TIME, MINI_BATCH, WINDOW = 16, 24, 4, 5
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
# Larger inner weights and rates than at the start of training, so that what is learned shows in the output.
TTT_OPTIONS = {"mini_batch_size": MINI_BATCH, "inner_learning_rate": 4.0, "kernel_init": nnx.initializers.normal(0.4)}

LAYERS = {
    "ttt_linear": lambda rngs: TTTLinear(WIDTH, 2, share_qk=True, gate=True, rngs=rngs, **TTT_OPTIONS, **F64),
    "linear_attention": lambda rngs: TTTLinear(
        WIDTH,
        2,
        inner_norm=False,
        inner_bias=False,
        learned_start=False,
        learned_rate=False,
        rngs=rngs,
        **{**TTT_OPTIONS, "mini_batch_size": TIME},
        **F64,
    ),
    "ttt_mlp": lambda rngs: TTTMLP(WIDTH, 2, rngs=rngs, **TTT_OPTIONS, **F64),
    "attention": lambda rngs: Attention(WIDTH, 4, num_kv_heads=2, max_length=TIME, rngs=rngs, **F64),
    "sliding_attention": lambda rngs: Attention(WIDTH, 4, sliding_window=WINDOW, qk_norm=True, rngs=rngs, **F64),
    "mamba": lambda rngs: Mamba(WIDTH, state_size=4, chunk_size=5, rngs=rngs, **F64),
    "mamba2": lambda rngs: Mamba2(WIDTH, state_size=4, head_dim=8, num_groups=2, chunk_size=5, rngs=rngs, **F64),
}
# They share their code with each other, and tests/mixers/test_learners.py is quicker.
LAYERS |= LEARNERS


class Case:
    """A layer with random parameters, as jitted functions of them."""

    def __init__(self, name: str):
        layer = LAYERS[name](nnx.Rngs(0))
        self.reach = WINDOW if name == "sliding_attention" else TIME  # tokens that a token sees, itself included
        self.at_once = name not in ("lact", "inplace_ttt")  # a chunk is read by the next one
        self.graph, parameters = nnx.split(layer)
        rng = np.random.default_rng(1)
        self.parameters = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape), parameters)
        self.x = jnp.asarray(rng.normal(size=(2, TIME, WIDTH)))
        self.whole = jax.jit(lambda p, x, ids: nnx.merge(self.graph, p)(x, ids))
        self.extend = jax.jit(lambda p, x, state, ids: nnx.merge(self.graph, p).extend(x, state, ids))

    def init_state(self, parameters, batch=2):
        return nnx.merge(self.graph, parameters).init_state(batch)

    def in_pieces(self, parameters, x, ids, cuts):
        state, outputs, start = self.init_state(parameters, x.shape[0]), [], 0
        for length in cuts:
            piece = slice(start, start + length)
            y, state = self.extend(parameters, x[:, piece], state, None if ids is None else ids[:, piece])
            outputs.append(y)
            start += length
        return jnp.concatenate(outputs, axis=1), state


CASES: dict[str, Case] = {}


def slow_unless(*names):
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in LAYERS]


# The dearest properties are shown of one layer of each kind always, of the others with the slow tests.
of_each_kind = pytest.mark.parametrize("case", slow_unless("ttt_linear", "attention", "mamba2"), indirect=True)


@pytest.fixture(params=slow_unless("ttt_linear", "ttt_mlp", "attention", "sliding_attention", "mamba", "mamba2"))
def case(request, x64):
    if request.param not in CASES:
        CASES[request.param] = Case(request.param)
    return CASES[request.param]


# Two rows of documents that start anywhere, with padding before, within and between them.
ANYWHERE = jnp.asarray([[0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 3, 3, 0, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1], [5] * 10 + [6] * 14])


def close(a, b, tolerance=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(y), initial=0))))


@pytest.mark.parametrize("packed", [False, True])
@given(cuts=st.lists(st.sampled_from([1, 7]), min_size=2, max_size=3))
@settings(max_examples=6)
def test_any_cut_gives_the_same(case, packed, cuts):
    ids = ANYWHERE if packed else None
    real = jnp.ones((2, TIME, 1)) if ids is None else (ids != 0)[..., None]
    time = sum(cuts)
    pieces, _ = case.in_pieces(case.parameters, case.x, ids, cuts)
    close((pieces * real[:, :time]), (case.whole(case.parameters, case.x, ids) * real)[:, :time])


@of_each_kind
def test_gradients_through_a_cut_are_those_of_the_whole(case):
    """Cut within a mini-batch and within a document."""
    weights = jnp.asarray(np.random.default_rng(2).normal(size=case.x.shape)) * (ANYWHERE != 0)[..., None]

    @jax.jit
    def difference(parameters, x):
        pieces = lambda p, x: jnp.sum(weights * case.in_pieces(p, x, ANYWHERE, (17, 7))[0])
        whole = lambda p, x: jnp.sum(weights * case.whole(p, x, ANYWHERE))
        return tuple(jax.grad(f, argnums=(0, 1))(parameters, x) for f in (pieces, whole))

    close(*difference(case.parameters, case.x))


@of_each_kind
def test_a_document_gives_packed_what_it_gives_alone(case):
    """Documents that start on a mini-batch boundary, as packers place them: outputs and gradients."""
    lengths, starts = (7, 5, 8), (0, 8, 16)
    ids = np.zeros((1, TIME), np.int32)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids[0, start : start + length] = i + 1
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(1, TIME, WIDTH)))

    def score(parameters, x, ids, weights):
        y = case.whole(parameters, x, ids)
        return jnp.sum(jnp.where((ids != 0)[..., None], weights * jnp.sin(y), 0)), y

    run = jax.jit(jax.value_and_grad(score, has_aux=True))
    (total, packed), gradient = run(case.parameters, case.x[:1], jnp.asarray(ids), weights)
    sums = None
    for start, length in zip(starts, lengths, strict=True):
        to_front = lambda a, s=start: jnp.roll(a, -s, axis=1)
        alone = jnp.asarray(np.arange(TIME)[None] < length, jnp.int32)
        (part, y), g = run(case.parameters, to_front(case.x[:1]), alone, to_front(weights))
        close(packed[:, start : start + length], y[:, :length])
        total = total - part
        sums = g if sums is None else jax.tree.map(jnp.add, sums, g)
    assert abs(float(total)) < 1e-9
    close(gradient, sums)


@of_each_kind
def test_nothing_reaches_a_token_from_later_or_from_another_document(case):
    def score(x, place):
        y = case.whole(case.parameters, x, ANYWHERE)
        return jnp.sum(jnp.sin(jax.lax.dynamic_index_in_dim(y, place, axis=1, keepdims=False)))

    gradient = jax.jit(jax.grad(score))
    documents = np.zeros(ANYWHERE.shape, int)  # runs of ids, padding taken out
    for row, ids in enumerate(np.asarray(ANYWHERE)):
        count, last = 0, 0
        for t, i in enumerate(ids):
            count += i not in (0, last)
            last = i or last
            documents[row, t] = count if i else -1
    for place in (4, 9, 12, 15, 21):
        reached = np.any(np.asarray(gradient(case.x, place)) != 0, axis=-1)
        for row in range(2):
            if documents[row, place] < 0:
                continue
            same = documents[row] == documents[row, place]
            seen = same & (np.arange(TIME) <= place) & (np.arange(TIME) > place - case.reach)
            assert not np.any(reached[row] & ~seen)
            if case.at_once:
                assert np.all(reached[row] | ~seen)  # and its own past does reach it


def test_rows_may_stand_at_different_offsets(case):
    def run(tokens, start, row):
        pieces = [case.x[row : row + 1, start : start + length] for length in tokens]
        state = case.init_state(case.parameters, 1)
        for piece in pieces:
            _, state = case.extend(case.parameters, piece, state, None)
        return state

    states = run((7,), 0, 0), run((7, 1, 1), 0, 1)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *states)
    x = case.x[:, 9:16]
    y, _ = case.extend(case.parameters, x, both, None)
    for row, state in enumerate(states):
        alone, _ = case.extend(case.parameters, x[row : row + 1], state, None)
        close(y[row : row + 1], alone)


@pytest.mark.long
@of_each_kind
def test_a_ragged_batch_gives_each_sequence_what_it_gives_alone(case):
    """Outputs, gradients and the state to go on from, with padding on any side; NaN in it reaches nothing."""
    lengths = (17, 6, 0)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, TIME, WIDTH))
    weights = jnp.asarray(rng.normal(size=(TIME, WIDTH)))
    score = lambda y: jnp.sum(jnp.sin(y) * weights[: y.shape[-2]])

    @jax.jit
    def gradient_alone(parameters, x):
        return jax.grad(lambda x: score(nnx.merge(case.graph, parameters)(x)))(x)[0]

    @jax.jit
    def together(parameters, x, given, weights):
        layer = nnx.merge(case.graph, parameters)
        score = lambda x: (jnp.sum(jnp.sin(y := layer(x, **given)) * weights), y)
        gradient, whole = jax.grad(score, has_aux=True)(x)
        return whole, *layer.extend(x, layer.init_state(3), **given), gradient

    start = case.init_state(case.parameters, 1)
    alone = [case.extend(case.parameters, x[r : r + 1, :length], start, None) for r, length in enumerate(lengths[:2])]
    expected_gradient = gradient_alone(case.parameters, x[:1, : lengths[0]])
    right = np.arange(TIME) < np.asarray(lengths)[:, None]
    for mask in (None, right[:, ::-1], rng.permuted(right, axis=1)):
        given = {"lengths": jnp.asarray(lengths)} if mask is None else {"mask": jnp.asarray(mask)}
        mask = right if mask is None else mask
        padded, weighed = np.full(x.shape, np.nan), np.zeros(x.shape)
        for row, length in enumerate(lengths):
            padded[row, mask[row]], weighed[row, mask[row]] = x[row, :length], weights[:length]
        whole, y, state, gradient = together(case.parameters, padded, given, weighed)
        for padding in (whole, y, gradient):
            assert not np.any(np.asarray(padding)[~mask])
        close(gradient[0, mask[0]], expected_gradient)
        for row, (expected, expected_state) in enumerate(alone):
            for a in (whole, y):
                close(a[row, mask[row]], expected[0])
            close(jax.tree.map(lambda a, row=row: a[row : row + 1], state), expected_state)
        close(jax.tree.map(lambda a: a[2:], state), start)  # no token came


def test_a_state_is_plain_data_that_can_be_saved_forked_and_restored(case, tmp_path):
    _, state = case.in_pieces(case.parameters, case.x[:, :7], None, (7,))
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        restored = jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    first, second = case.x[:, 8:15], case.x[:, 16:23]
    expected, _ = case.extend(case.parameters, first, state, None)
    case.extend(case.parameters, second, state, None)  # a fork goes its own way and leaves the state as it was
    y, _ = case.extend(case.parameters, first, restored, None)
    np.testing.assert_array_equal(y, expected)


def test_a_state_can_be_carried_by_a_scan(case):
    """Shapes and dtypes of a state never change, so it can be the carry of a compiled loop."""
    before = case.init_state(case.parameters)
    _, after = case.extend(case.parameters, case.x[:, :7], before, None)
    describe = lambda state: jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert describe(after) == describe(before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
