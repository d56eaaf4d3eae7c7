"""Joint training learns both tasks, and a training that was stopped ends as if it had not been."""

import os
import signal
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from tests.adaptation.models import same, tiny
from tttlm.adaptation import cross_entropy, denoising_objective
from tttlm.adaptation.joint import JointConfig, train_jointly
from tttlm.adaptation.y_shape import YShaped
from tttlm.errors import InputError

LABELS = np.arange(48, dtype=np.int32) % 3
IMAGES = np.random.default_rng(0).normal(size=(48, 2, 2, 2)).astype(np.float32)
IMAGES[:, :, :, 0] += LABELS[:, None, None]
CONFIG = JointConfig(epochs=12, batch_size=16, learning_rate=0.05, padding=0, flip=False, checkpoint_every=7)
OBJECTIVE = denoising_objective(0.1)


class Flat(YShaped):
    """The tiny Y on images of eight numbers."""

    def __call__(self, inputs):
        return super().__call__(inputs.reshape(len(inputs), -1))

    def self_supervised(self, inputs):
        return super().self_supervised(inputs.reshape(len(inputs), -1))


def maker(norm=None):
    """Makes the same tiny model every time."""
    model = tiny(norm=norm)
    return lambda rngs: Flat(*(nnx.clone(part) for part in (model.shared, model.main, model.auxiliary)))


make = maker()


@pytest.mark.long
def test_it_learns_both_tasks_or_the_main_one_alone(tmp_path):
    key, start = jax.random.key(0), make(None)
    both = train_jointly(make, OBJECTIVE, IMAGES, LABELS, CONFIG, tmp_path / "joint")
    plain = train_jointly(make, None, IMAGES, LABELS, CONFIG, tmp_path / "plain")
    for model in (both, plain):
        assert cross_entropy(model, IMAGES, LABELS) < 0.7 * cross_entropy(start, IMAGES, LABELS)
    assert OBJECTIVE(both, IMAGES, key) < 0.7 * OBJECTIVE(plain, IMAGES, key)
    read = train_jointly(make, OBJECTIVE, IMAGES, LABELS, CONFIG, tmp_path / "joint")
    assert same(nnx.state(read), nnx.state(both))


@pytest.mark.long
@pytest.mark.parametrize(("norm", "number"), [(None, signal.SIGINT), (nnx.BatchNorm, signal.SIGTERM)])
def test_stopped_by_a_signal_it_goes_on_bit_for_bit(tmp_path, norm, number):
    calls = []

    class Terminated(Exception):
        pass

    def terminate(number, frame):
        raise Terminated

    def interrupting(model, inputs, rng):
        jax.debug.callback(lambda: calls.append(1) or (len(calls) == 17 and os.kill(os.getpid(), number)))
        return OBJECTIVE(model, inputs, rng)

    made = maker(norm)
    whole = train_jointly(made, OBJECTIVE, IMAGES, LABELS, CONFIG, tmp_path / "whole")
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
            train_jointly(made, interrupting, IMAGES, LABELS, CONFIG, tmp_path / "stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert 16 < len(calls) < 30
    resumed = train_jointly(made, OBJECTIVE, IMAGES, LABELS, CONFIG, tmp_path / "stopped")
    assert same(nnx.state(resumed), nnx.state(whole))


@pytest.mark.long
def test_batch_statistics_of_training_are_kept_and_used_afterwards(tmp_path):
    model = train_jointly(maker(partial(nnx.BatchNorm, momentum=0.8)), OBJECTIVE, IMAGES, LABELS, CONFIG, tmp_path)
    norm = model.shared.layers[1]
    assert norm.use_running_average
    h = model.shared.layers[0](IMAGES.reshape(48, -1))
    np.testing.assert_allclose(norm.mean[...], h.mean(0), atol=0.3)
    assert float(np.abs(norm.mean[...]).max()) > 0.3


def test_a_batch_that_cannot_be_filled_is_refused(tmp_path):
    with pytest.raises(InputError, match="are fewer than a batch"):
        train_jointly(make, None, IMAGES[:8], LABELS[:8], CONFIG, tmp_path)
