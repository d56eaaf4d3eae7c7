"""Training that carries the state of mixers from step to step reads documents whole, and nothing else than them."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.small import prepare_config, small_config, write_texts
from tests.training.test_loop import numbers, on_batch, params
from tttlm.data import Batch, prepare
from tttlm.errors import InputError
from tttlm.training import loop
from tttlm.training.sharding import make_mesh
from tttlm.training.step import Model, batch_gradient, batch_loss, init_state, make_train_step

LENGTH, EXAMPLES = 16, 3
MIXERS = ["ttt_linear", "ttt_mlp", "attention", "sliding_attention", "mamba", "mamba2"]


def config_of(mixer: str, **changes):
    sizes = {"model.num_layers": 1, "model.mamba2.head_dim": 8, "model.ttt.mini_batch_size": 4}
    sizes |= {"model.attention.sliding_window": 20, "model.attention.max_length": 64}
    shape = {"sequence_length": LENGTH, "batch_size": EXAMPLES, "data.layout": "documents"}
    return small_config(**{**sizes, **shape, "model.mixers": (mixer,), **changes})


def steps_of(documents: list[list[np.ndarray]]) -> list[Batch[np.ndarray]]:
    """Batches that read a list of documents at each position, as the loader gives them."""
    lanes = []
    for at_position in documents:
        lane = []
        for number, tokens in enumerate(at_position, start=1):
            for start in range(0, len(tokens) - 1, LENGTH):
                pairs = np.stack([tokens[:-1], tokens[1:]])[:, start : start + LENGTH]
                real = np.arange(LENGTH) < pairs.shape[1]
                pairs = np.pad(pairs, ((0, 0), (0, LENGTH - pairs.shape[1])))
                lane.append((*pairs.astype(np.int32), (number * real).astype(np.int32), real.astype("f"), start > 0))
        lanes.append(lane)
    empty = (*np.zeros((3, LENGTH), np.int32), np.zeros(LENGTH, "f"), False)
    count = max(map(len, lanes))
    steps = [[lane[i] if i < len(lane) else empty for lane in lanes] for i in range(count)]
    return [Batch(*map(np.stack, zip(*step, strict=True))) for step in steps]


def some_documents(seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = [[50, 5], [17, 16, 20], [40]]
    return [[rng.integers(0, 300, length + 1) for length in at_position] for at_position in lengths]


@pytest.mark.long
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_losses_of_all_steps_are_those_of_the_whole_documents(x64, mixer):
    config = config_of(mixer, **{"model.dtype": "float64", "model.param_dtype": "float64"})
    model = Model(config.model)
    state = init_state(config, model)
    loss = jax.jit(lambda batch, carried: batch_loss(config, model, state.params, batch, 1.0, carried))
    total, carried = 0.0, state.carried
    documents = some_documents()
    for batch in steps_of(documents):
        of_step, carried = loss(batch, carried)
        total += float(of_step)
    alone = replace(config, data=replace(config.data, layout="windows"))
    rows = [tokens for at_position in documents for tokens in at_position]
    padded = np.stack([np.pad(tokens, (0, 53 - len(tokens))) for tokens in rows]).astype(np.int32)
    real = np.arange(52) < np.array([[len(tokens) - 1] for tokens in rows])
    batch = Batch(padded[:, :-1], padded[:, 1:], weights=real.astype("f"))
    whole = jax.jit(lambda batch: batch_loss(alone, model, state.params, batch, 1.0)[0])(batch)
    assert total == pytest.approx(float(whole), rel=1e-9)


@pytest.mark.long
def test_the_gradient_reaches_the_initial_state_and_ends_at_the_beginning_of_a_step(x64):
    config = config_of("ttt_linear", **{"model.dtype": "float64", "model.param_dtype": "float64"})
    model = Model(config.model)
    state = init_state(config, model)
    first, second, *_ = steps_of(some_documents())
    gradient = jax.jit(partial(batch_gradient, config, model, multiplier=1.0))
    _, _, grads, carried = gradient(state.params, first, carried=state.carried)
    inner = grads["stack"]["blocks"][0]["mixer"]["inner"][0]["kernel"]
    assert float(jnp.abs(inner).max()) > 0  # documents begin: the learned initial weights are learned
    continued = second._replace(continues=np.array([True, True, True]))
    _, _, grads, _ = gradient(state.params, continued, carried=carried)
    inner = grads["stack"]["blocks"][0]["mixer"]["inner"][0]["kernel"]
    assert float(jnp.abs(inner).max()) == 0


@pytest.mark.long
def test_a_batch_taken_in_parts_has_the_gradient_and_the_state_of_the_whole(x64):
    changes = {"batch_size": 4, "model.dtype": "float64", "model.param_dtype": "float64"}
    documents = [*some_documents(), [np.arange(40)]]
    found = []
    for parts in (1, 2):
        config = config_of("ttt_linear", accumulate=parts, **changes)
        model = Model(config.model)
        state = init_state(config, model)
        gradient, carried = jax.jit(partial(batch_gradient, config, model, multiplier=1.0)), state.carried
        for batch in steps_of(documents)[:3]:
            *result, carried = gradient(state.params, batch, carried=carried)
        found.append((result, carried))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *found)


@pytest.mark.long
def test_after_a_step_that_is_skipped_no_document_goes_on_from_another(x64):
    """The second step, in which a document begins, is not applied: the third goes on from what it began with."""
    config = config_of("ttt_linear", **{"faults.policy": "skip", "optimizer.learning_rate": 1e-30})
    model = Model(config.model)
    steps = steps_of([[np.arange(17), np.arange(100, 140)]] * EXAMPLES)
    step = make_train_step(config, model, make_mesh(config.mesh))

    def third_loss(first: Batch[np.ndarray]) -> float:
        state, _ = step(init_state(config, model), first)
        bad = steps[1]._replace(weights=np.full_like(steps[1].weights, np.nan))
        state, values = step(state, bad)
        assert not values["good"]
        return float(step(state, steps[2])[1]["loss"])

    other = steps[0]._replace(inputs=steps[0].inputs + 200)
    assert third_loss(steps[0]) == third_loss(other)


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory):
    """Documents of several steps each."""
    folder = tmp_path_factory.mktemp("documents")
    prepare(prepare_config(write_texts(folder / "texts")), folder / "data")
    return folder / "data"


def run_config(folder, data, **changes):
    changes = {"data.layout": "documents", "model.mixers": ("ttt_linear",), "steps": 8, **changes}
    return small_config(folder, data, **{"model.num_layers": 1, "evaluate.every": 4, "evaluate.batches": 3, **changes})


@pytest.mark.long
def test_a_run_that_carries_state_goes_on_bit_for_bit(long_documents, tmp_path, monkeypatch):
    whole = run_config(tmp_path / "whole", long_documents)
    assert loop.train(whole).reason == "finished"
    config = run_config(tmp_path / "run", long_documents)

    def die(batch, _):
        if batch == 7:
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        on_batch(patch, die)
        with pytest.raises(SystemExit):
            loop.train(config)
    assert loop.train(config).reason == "finished"
    assert numbers(config) == numbers(whole)
    jax.tree.map(np.testing.assert_array_equal, params(config), params(whole))


def test_what_a_carried_state_cannot_do_is_refused_before_anything_is_written(long_documents, tmp_path):
    short = run_config(tmp_path / "run", long_documents, **{"model.mixers": ("attention",)})
    short = replace(short, model=short.model.with_cache_length(64))
    with pytest.raises(InputError, match=r"the longest document takes [\d,]+ positions .* attention has room for 64"):
        loop.train(short)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "attention", "mamba2"])
def test_documents_are_carried_the_same_on_a_mesh(mixer):
    command = [sys.executable, "-m", "tests.training.carried_meshes", mixer, "1x1", "2x1", "1x4", "2x2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    one, *others = json.loads(done.stdout)
    assert len(one) == 5
    for other in others:
        assert other == pytest.approx(one, abs=1e-5, rel=0)
