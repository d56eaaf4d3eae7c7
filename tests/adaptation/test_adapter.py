"""An adapter learns from a sample before it predicts it, alone or on and on, and can always go back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adaptation.models import same, samples, tiny
from tttlm.adaptation import Adapter, denoising_objective, masked_objective, no_adaptation
from tttlm.adaptation.y_shape import SELF_SUPERVISED_PATH
from tttlm.errors import InputError

OBJECTIVE = denoising_objective(0.1)


def make(**changes) -> Adapter:
    chosen = {"learns": SELF_SUPERVISED_PATH, "optimizer": optax.adam(0.05), "steps": 2, "seed": 3}
    return Adapter(tiny(), OBJECTIVE, **{**chosen, **changes})


@partial(jax.jit, static_argnums=0)
def gradient_of(graph, params, rest, inputs, key):
    return jax.grad(lambda params: OBJECTIVE(nnx.merge(graph, params, rest), inputs, key))(params)


def test_a_sample_is_predicted_by_the_model_that_plain_steps_on_it_give():
    adapter, inputs = make(steps=3, optimizer=optax.sgd(0.1, momentum=0.9)), samples(4)
    predicted = adapter(inputs)
    for i, x in enumerate(inputs):
        model, optimizer = tiny(), optax.sgd(0.1, momentum=0.9)
        graph, params, rest = nnx.split(model, SELF_SUPERVISED_PATH, ...)
        opt_state = optimizer.init(params)
        for key in jax.random.split(jax.random.fold_in(jax.random.key(3), i), 3):
            gradient = gradient_of(graph, params, rest, x[None], key)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(predicted[i], nnx.merge(graph, params, rest)(x[None])[0], rtol=2e-5, atol=2e-6)
    assert not np.allclose(predicted, tiny()(inputs), atol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("reset", ["sample", "never", "document"])
@pytest.mark.parametrize("batch_size", [1, 3])
@settings(max_examples=2)
@given(cut=st.integers(1, 3))
def test_calls_may_cut_a_stream_anywhere(reset, batch_size, cut):
    inputs, cut = samples(12), cut * 3
    starts = np.arange(12) % 6 == 0
    whole = make(reset=reset, batch_size=batch_size)
    pieces = make(reset=reset, batch_size=batch_size)
    expected = whole(inputs, starts)
    got = jnp.concatenate([pieces(inputs[:cut], starts[:cut]), pieces(inputs[cut:], starts[cut:])])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert int(pieces.state.position) == int(whole.state.position) == 12 // batch_size


def test_samples_adapted_side_by_side_are_as_those_adapted_one_by_one():
    inputs = samples(7)
    np.testing.assert_allclose(make(parallel=4)(inputs), make()(inputs), rtol=1e-4, atol=1e-6)


def test_a_document_starts_from_the_first_parameters_and_the_stream_goes_on_from_the_last():
    inputs = samples(8)
    documents = make(reset="document", steps=1, optimizer=optax.sgd(0.1))
    by_document = documents(inputs, np.arange(8) == 4)
    online = make(reset="never", steps=1, optimizer=optax.sgd(0.1))(inputs)
    np.testing.assert_array_equal(by_document[:4], online[:4])
    assert not np.allclose(by_document[4:], online[4:])
    alone = make(reset="document", steps=1, optimizer=optax.sgd(0.1))
    alone.state = alone.state._replace(position=jnp.int32(4))
    np.testing.assert_array_equal(alone(inputs[4:]), by_document[4:])


@pytest.mark.parametrize("reset", ["sample", "never"])
def test_reset_restores_everything_bit_for_bit(reset):
    adapter, inputs = make(reset=reset), samples(6)
    before, predicted = adapter.state, adapter(inputs)
    assert not same(adapter.state, before)
    adapter.reset()
    assert same(adapter.state, before)
    assert same(nnx.state(adapter.model), nnx.state(tiny()))
    np.testing.assert_array_equal(adapter(inputs), predicted)


def test_the_model_that_was_given_stays_as_it_was():
    model = tiny()
    adapter = Adapter(model, OBJECTIVE, learns=SELF_SUPERVISED_PATH, optimizer=optax.sgd(0.1), reset="never")
    adapter(samples(3))
    assert same(nnx.state(model), nnx.state(tiny()))
    assert same(nnx.state(adapter.model.main), nnx.state(model.main))
    assert not same(nnx.state(adapter.model.shared), nnx.state(model.shared))


def test_saved_state_goes_on_bit_for_bit(tmp_path):
    inputs, first, second = samples(8), make(reset="never"), make(reset="never")
    first(inputs[:4])
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    assert same(first.state, second.state)
    np.testing.assert_array_equal(first(inputs[4:]), second(inputs[4:]))
    with pytest.raises(InputError, match="cannot be read"):
        second.load(tmp_path / "missing")
    with pytest.raises(InputError, match="this adapter has"):
        make(reset="never", optimizer=optax.sgd(0.1)).load(tmp_path / "state.safetensors")
    content = bytearray((tmp_path / "state.safetensors").read_bytes())
    content[-2] ^= 1
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        second.load(tmp_path / "state.safetensors")


@pytest.mark.parametrize("reset", ["sample", "never"])
def test_it_compiles_once(reset):
    traced = []

    def counted(model, inputs, rng):
        traced.append(inputs.shape)
        return OBJECTIVE(model, inputs, rng)

    adapter = Adapter(tiny(), counted, learns=SELF_SUPERVISED_PATH, reset=reset, steps=4)
    adapter(samples(5))
    once = len(traced)
    for seed in range(3):
        adapter(samples(5, seed))
    adapter.reset()
    adapter(samples(5))
    assert len(traced) == once


def test_decay_pulls_towards_the_first_parameters():
    free, pulled, tied = (make(reset="never", decay=decay) for decay in (0.0, 0.3, 1.0))
    distance = []
    for adapter in (free, pulled, tied):
        adapter(samples(6))
        gap = jax.tree.map(jnp.subtract, nnx.state(adapter.model), nnx.state(tiny()))
        distance.append(float(optax.tree.norm(gap)))
    assert distance[0] > 1.5 * distance[1] > 0
    assert distance[2] < 1e-6


def test_predicting_first_answers_with_what_was_known_before():
    inputs = samples(6)
    first = make(reset="never", order="predict_first", batch_size=2)(inputs)
    np.testing.assert_array_equal(first[:2], no_adaptation(tiny(), batch_size=2)(inputs[:2]))
    assert not np.allclose(first[2:], tiny()(inputs[2:]))


def test_memory_is_parameters_that_learn_their_gradient_and_the_optimiser():
    model = tiny()
    learns = [x.size for x in jax.tree.leaves(nnx.state(model, SELF_SUPERVISED_PATH))]
    assert sum(learns) == (8 + 1) * 12 + (12 + 1) * 8
    assert make(optimizer=optax.sgd(0.1)).bytes_per_unit == 2 * 4 * sum(learns)
    assert make(optimizer=optax.adam(0.1)).bytes_per_unit == 4 * 4 * sum(learns) + 4  # and a counter


def test_inputs_may_be_a_tree():
    def predict(model, inputs):
        return {"logits": model(inputs["x"] * inputs["scale"][:, None])}

    adapter = Adapter(tiny(), None, predict=predict, batch_size=2)
    inputs = {"x": samples(5), "scale": np.arange(5, dtype=np.float32)}
    np.testing.assert_allclose(adapter(inputs)["logits"], predict(tiny(), inputs)["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reset": "often"}, "reset is one of"),
        ({"order": "later"}, "order is one of"),
        ({"learns": nnx.PathContains("nowhere")}, "selects no variable"),
        ({"batch_size": 0}, "at least 1"),
        ({"decay": 2.0}, "decay between"),
        ({"order": "predict_first"}, "never uses what it learns"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        make(**changes)


def test_inputs_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="empty"):
        make()(samples(0))
    with pytest.raises(InputError, match="starts a document inside"):
        make(reset="document", batch_size=2)(samples(4), np.arange(4) == 1)
    with pytest.raises(InputError, match="for each of the 4"):
        make(reset="document")(samples(4), np.arange(3) == 1)
    with pytest.raises(InputError, match="fraction"):
        masked_objective(1.5)
