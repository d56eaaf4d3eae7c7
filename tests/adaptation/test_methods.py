"""Each method is what its paper says, and none of them sees what it may not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.adaptation.models import same, samples, tiny
from tttlm.adaptation import (
    Adapter,
    batch_statistics,
    continual,
    correlated_labels,
    cross_entropy,
    denoising_objective,
    episodic,
    growing,
    mixed,
    no_adaptation,
    parameters_of,
    run_stream,
    tent,
    uda_ss,
)
from tttlm.adaptation.methods import NORMS
from tttlm.adaptation.y_shape import SELF_SUPERVISED_PATH
from tttlm.errors import InputError

LABELS = np.arange(12) % 3
SHIFTS = {1: samples(12, 1) + 1, 2: samples(12, 2) + 2}
OBJECTIVE = denoising_objective(0.1)
STREAMS = {
    "episodic": episodic(SHIFTS, LABELS),
    "continual": continual(SHIFTS, LABELS),
    "growing": growing(SHIFTS, LABELS),
    "mixed": mixed(SHIFTS, LABELS),
    "correlated labels": correlated_labels(SHIFTS, LABELS),
}


def ttt(**changes):
    return Adapter(tiny(), OBJECTIVE, learns=SELF_SUPERVISED_PATH, optimizer=optax.sgd(0.1), **changes)


METHODS = {
    "none": lambda: no_adaptation(tiny()),
    "ttt": lambda: ttt(steps=2),
    "ttt, side by side": lambda: ttt(parallel=3),
    "ttt_online": lambda: ttt(reset="never"),
    "batch statistics": lambda: batch_statistics(tiny(norm=nnx.BatchNorm), batch_size=4),
    "tent": lambda: tent(tiny(norm=nnx.LayerNorm), optimizer=optax.sgd(0.1), batch_size=4),
    "tent, BatchNorm": lambda: tent(tiny(norm=nnx.BatchNorm), optimizer=optax.sgd(0.1), batch_size=4),
}


def scores(method, stream) -> np.ndarray:
    """-log p(label) of every sample."""
    predictions = run_stream(method, stream)
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(predictions, stream.labels))


def looks_ahead(score, inputs: np.ndarray, labels: np.ndarray, here: int, unit: int = 1) -> bool:
    """Whether changing what comes after the unit of sample `here`, or labels from `here` on, changes a score before."""
    end = (here // unit + 1) * unit
    before = score(inputs, labels)
    changed_inputs, changed_labels = inputs.copy(), labels.copy()
    changed_inputs[end:] = -3 * changed_inputs[end:] + 1
    changed_labels[here:] = (changed_labels[here:] + 1) % 3
    by_input, by_label = score(changed_inputs, labels)[:end], score(inputs, changed_labels)[:here]
    return not (np.array_equal(by_input, before[:end]) and np.array_equal(by_label, before[:here]))


def scored(method, stream):
    changed = lambda inputs, labels: type(stream)(inputs, labels, stream.starts, stream.shifts)
    return lambda inputs, labels: scores(method, changed(inputs, labels))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("method", METHODS)
def test_later_samples_and_labels_leave_earlier_scores_bit_identical(method, stream):
    made, stream = METHODS[method](), STREAMS[stream]
    for here in (3, len(stream) - 5):
        assert not looks_ahead(scored(made, stream), stream.inputs, stream.labels, here, made.batch_size)


def test_the_same_test_catches_methods_that_look_ahead():
    stream = STREAMS["continual"]

    def learned_from_all_labels(inputs, labels):  # scores after it learned
        graph, params, rest = nnx.split(tiny(), nnx.Param, ...)
        gradient = jax.grad(lambda p: cross_entropy(nnx.merge(graph, p, rest), jnp.asarray(inputs), labels))(params)
        learned = nnx.merge(graph, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), rest)
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(learned(jnp.asarray(inputs)), labels))

    def adapted_to_all_inputs(inputs, labels):  # one unit of everything, handed over as if it came one by one
        return scored(ttt(batch_size=len(labels)), stream)(inputs, labels)

    for cheat in (learned_from_all_labels, adapted_to_all_inputs):
        assert looks_ahead(cheat, stream.inputs, stream.labels, 5)


def uda(inputs, labels):
    source = samples(24), np.arange(24) % 3
    trained = uda_ss(tiny(), cross_entropy, OBJECTIVE, source, inputs, optimizer=optax.sgd(0.1), steps=3, batch_size=6)
    return scores(trained, continual({0: inputs}, labels))


def test_uda_ss_sees_all_test_inputs_and_no_label():
    inputs, labels = SHIFTS[1], LABELS
    flipped = (labels + 1) % 3
    before, after = uda(inputs, labels), uda(inputs, np.where(np.arange(12) < 6, labels, flipped))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert looks_ahead(uda, inputs, labels, 5)  # at inputs, which is what it is allowed and the others are not


def test_uda_ss_lowers_both_losses_of_what_it_trains_on():
    source, target = (samples(48), (samples(48)[:, 0] > 0).astype(np.int32)), samples(48, 4) + 1
    model = tiny()
    settings = {"optimizer": optax.adam(1e-2), "steps": 80, "batch_size": 16}
    trained = uda_ss(model, cross_entropy, denoising_objective(0.1), source, target, **settings).model
    assert cross_entropy(trained, *source) < 0.6 * cross_entropy(model, *source)
    key = jax.random.key(0)
    assert OBJECTIVE(trained, target, key) < 0.6 * OBJECTIVE(model, target, key)
    assert same(nnx.state(model), nnx.state(tiny()))


def test_batch_statistics_normalise_a_batch_by_its_own_mean_and_variance():
    model = tiny(norm=nnx.BatchNorm)
    inputs = samples(8) * 5 + 2
    h = model.shared.layers[0](inputs)
    h = jax.nn.relu((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5))
    np.testing.assert_allclose(batch_statistics(model, batch_size=8)(inputs), model.main(h), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="no BatchNorm"):
        batch_statistics(tiny(), batch_size=8)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm])
def test_tent_lowers_entropy_by_norms_alone(norm):
    model = tiny(norm=norm)
    method = tent(model, optimizer=optax.adam(0.05), batch_size=12)
    inputs = samples(12) + 1
    entropy = []
    for _ in range(10):
        p = jax.nn.softmax(method(inputs))
        entropy.append(-float(jnp.mean(jnp.sum(p * jnp.log(p), -1))))
    assert entropy[-1] < 0.9 * entropy[0]
    only_norms = parameters_of(model, *NORMS)
    adapted, first = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (method.model, model))
    for path, value in adapted.items():
        assert bool(jnp.array_equal(value[...], first[path][...])) != only_norms(path, value)
    with pytest.raises(InputError, match="no parameters of"):
        tent(tiny(), optimizer=optax.sgd(0.1), batch_size=4)


def test_ttt_online_learns_the_self_supervised_task_of_the_shift_as_it_goes():
    inputs = samples(200, 5) + 2
    online = Adapter(tiny(), OBJECTIVE, learns=SELF_SUPERVISED_PATH, optimizer=optax.sgd(0.05), reset="never")
    online(inputs)
    key, fresh = jax.random.key(0), samples(64, 6) + 2
    assert OBJECTIVE(online.model, fresh, key) < 0.5 * OBJECTIVE(tiny(), fresh, key)
