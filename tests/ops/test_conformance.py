"""What holds for every learner and every implementation, exactly.

Sequences are short and chunks are small, because nearly all of the time goes into compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.learners import LEARNERS, B, H, K, M, T, make, piece
from tttlm.ops.documents import documents
from tttlm.ops.target import target_platform
from tttlm.ops.ttt import IMPLEMENTATIONS, Shapes, init_learner_state, learn
from tttlm.ops.ttt.statistics import _read, learner_statistics

SHAPES = Shapes(B, T, H, K, K)
PAIRS = [
    (name, how)
    for name, learner in LEARNERS.items()
    for how, one in IMPLEMENTATIONS.items()
    if one.supports(learner, target_platform(), SHAPES) is None
]
FAST = {name: next(how for n, how in PAIRS if n == name) for name in LEARNERS}

# These have every part and every implementation among them; the others are slow tests.
ALWAYS = {
    ("ttt_mlp", "dual"),
    ("titans_linear", "dual"),
    ("gla", "delta"),
    ("longhorn_diagonal", "linear_scan"),
    ("gated_deltaproduct", "delta"),
    ("comba", "delta"),
    ("mesanet", "linear_scan"),
    ("lact_prenorm", "chunked"),
    ("tnt_local", "dual"),
}
LONG = {("atlas", "chunked"), ("clipped_swiglu", "chunked")}
assert set(PAIRS) >= ALWAYS | LONG


def slow_unless(always, long, all_of_them):
    marks = dict.fromkeys(long, pytest.mark.long) | dict.fromkeys(always, ())
    return [pytest.param(each, marks=marks.get(each, pytest.mark.slow)) for each in all_of_them]


NAMES = slow_unless({name for name, _ in ALWAYS}, {name for name, _ in LONG}, LEARNERS)

# Documents that start anywhere, some within one chunk, with padding before, within, between and behind them.
ANYWHERE = np.array(
    [
        [0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 3, 3, 0, 3, 3, 3, 1, 1, 0],
        [5, 5, 5, 5, 6, 7, 8, 8, 8, 8, 8, 8, 0, 8, 8, 8, 8, 8, 8, 9],
    ]
)


@pytest.fixture(autouse=True)
def in_float64(x64):
    return


def close(a, b, tolerance=1e-9):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        size = max(1.0, float(np.max(np.abs(y), initial=0)))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size, err_msg=where, equal_nan=False)


def everything(learner, how, cuts, args, with_gradients):
    """Outputs at real tokens, the state after them, and the gradients of a function of both."""
    ids = jnp.asarray(ANYWHERE)

    def score(inputs, weights, options):
        state, outputs, start = None, [], 0
        for end in cuts:
            out, state = learn(
                learner,
                piece(learner, inputs, start, end),
                weights,
                **options,
                state=state,
                segment_ids=ids[:, start:end],
                implementation=how,
            )
            outputs.append(out)
            start = end
        out = jnp.where((ids != 0)[..., None, None], jnp.concatenate(outputs, axis=1), 0)
        floats = [w for w in jax.tree.leaves(state) if jnp.issubdtype(w.dtype, jnp.floating)]
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(w)) for w in floats), (out, state)

    return jax.jit(jax.value_and_grad(score, (0, 1, 2), has_aux=True) if with_gradients else score)(*args)


@pytest.mark.parametrize("with_gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", slow_unless(ALWAYS, LONG, [p for p in PAIRS if p[1] != "reference"]), ids="-".join)
def test_cut_anywhere_with_documents_anywhere_it_is_the_definition(pair, with_gradients):
    name, how = pair
    learner, args = LEARNERS[name], make(LEARNERS[name])
    found = everything(learner, how, (10, T), args, with_gradients)
    close(found, everything(learner, "reference", (T,), args, with_gradients))


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_is_whole(name):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner)

    @jax.jit
    def both(inputs, weights, options):
        run = lambda x, **more: learn(learner, x, weights, **options, implementation=FAST[name], **more)
        whole = run(inputs)
        by_token = lambda a: a.reshape(B, T, a.shape[1] // T, *a.shape[2:]).swapaxes(0, 1)
        step = lambda state, x: run(x, state=state)[::-1]
        state, out = jax.lax.scan(step, init_learner_state(learner, weights, B, K, K), jax.tree.map(by_token, inputs))
        return (out[:, :, 0].swapaxes(0, 1), state), whole

    close(*both(inputs, weights, options))


@pytest.mark.parametrize("name", NAMES)
def test_a_document_gives_packed_what_it_gives_alone(name):
    """Documents that start where all clocks are at zero, with the promise that they do."""
    learner = LEARNERS[name]
    inputs, weights, options = make(learner, batch=1)
    start = max(learner.clocks.period, M)
    ids = jnp.where(jnp.arange(T) < start - 1, 1, jnp.where(jnp.arange(T) < start, 0, 2))[None]

    @jax.jit
    def both(inputs, weights, options):
        run = lambda x, **more: learn(learner, x, weights, **options, implementation=FAST[name], **more)[0]
        packed = run(inputs, segment_ids=ids, aligned=True)
        alone = run(piece(learner, inputs, start, T))
        return (packed[:, start:], packed[:, : start - 1]), (alone, run(inputs)[:, : start - 1])

    close(*both(inputs, weights, options))


WITH_CLOCKS = ["ttt_mlp", "titans_mlp", "lact_prenorm", "tnt_local", "atlas", "inplace_ttt"]


@pytest.mark.parametrize("name", slow_unless(["ttt_mlp", "inplace_ttt"], (), WITH_CLOCKS))
def test_alignment_is_decided_when_the_program_is_traced(name):
    """What it promises away is not in the program: branches for documents within a chunk, and for rows within one."""
    learner = LEARNERS[name]
    inputs, weights, options = make(learner)
    state = init_learner_state(learner, weights, B, K, K)

    def program(**more):
        return str(jax.make_jaxpr(lambda x: learn(learner, x, weights, **options, **more))(inputs))

    ids = jnp.asarray(ANYWHERE)
    anywhere, shifted = program(segment_ids=ids), program(state=state)
    assert "cond[" in anywhere
    assert f"length={T // M + 1}" in shifted  # chunks of rows that start within one
    for given in ({}, {"segment_ids": ids, "aligned": True}):
        for more in ({}, {"state": state, "on_boundary": True}):
            promised = program(**given, **more)
            assert "cond[" not in promised
            assert f"length={T // M + 1}" not in promised


@pytest.mark.parametrize("name", slow_unless(["titans_mlp"], (), WITH_CLOCKS))
def test_from_a_boundary_the_aligned_path_gives_the_same(name):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner)
    cut = learner.clocks.period

    @jax.jit
    def both(inputs, weights, options):
        run = lambda x, **more: learn(learner, x, weights, **options, implementation=FAST[name], **more)
        _, state = run(piece(learner, inputs, 0, cut))
        rest = piece(learner, inputs, cut, T)
        return run(rest, state=state, on_boundary=True), run(rest, state=state)

    close(*both(inputs, weights, options))


MEASURED = ["gated_deltanet", "lact_prenorm", "mesanet", "titans_mlp", "longhorn_diagonal"]


@pytest.mark.parametrize("name", slow_unless(MEASURED[:2], (), MEASURED))
def test_statistics_are_those_of_the_definition(name):
    """The drift by the states of the definition, and learning lowers the loss of what was learned from."""
    learner = LEARNERS[name]
    inputs, weights, options = make(learner, time=32)
    inputs = inputs._replace(rates=jax.tree.map(lambda a: 0.2 * a, inputs.rates))
    found = jax.jit(lambda *a: learner_statistics(learner, a[0], a[1], **a[2]))(inputs, weights, options)
    _, state = learn(learner, inputs, weights, **options, implementation="reference")
    read = lambda state: _read(learner, state, weights, options["slow"])
    start = read(init_learner_state(learner, weights, B, K, K))
    squares = lambda w: np.sum(np.square(w), tuple(range(2, w.ndim)))
    distance = lambda tree: np.mean(np.sqrt(sum(map(squares, jax.tree.leaves(tree)))))
    close(found.drift[-1], distance(jax.tree.map(jnp.subtract, read(state), start)))
    close(found.weight_norm, distance(read(state)))
    rates = [np.mean(a) for a in jax.tree.leaves(inputs.rates)]
    close(found.learning_rate, np.mean(rates))
    assert found.loss_after < found.loss_before


@pytest.mark.parametrize("name", ["kda", "titans_mlp", "lact_prenorm", "tnt_local_chunk"])
def test_what_is_behind_its_length_changes_no_state(name):
    learner = LEARNERS[name]
    inputs, weights, options = make(learner)
    lengths = (7, 13)
    ids = jnp.where(jnp.arange(T) < jnp.array(lengths)[:, None], 1, 0)
    docs = documents(ids, lengths=jnp.array(lengths))
    run = lambda x, docs, how: learn(learner, x, weights, **options, segment_ids=docs, implementation=how)[1]
    found = jax.jit(lambda x: run(x, docs, FAST[name]))(inputs)
    for row, length in enumerate(lengths):
        of_row = lambda tree, row=row: jax.tree.map(lambda a: a[row : row + 1], tree)
        alone = jax.jit(lambda x: run(x, None, "reference"))(of_row(piece(learner, inputs, 0, length)))
        close(of_row(found), alone)
