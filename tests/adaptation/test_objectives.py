"""Self-supervised losses are their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.adaptation import (
    denoising_objective,
    entropy_objective,
    masked_objective,
    on_random_crops,
    rotation_objective,
)
from tttlm.errors import InputError

KEY = jax.random.key(0)


class Answers:
    """Answers the self-supervised task by a function, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def self_supervised(self, inputs):
        self.asked = np.asarray(inputs)
        return self.answer(inputs)


def test_rotation_shows_all_four_quarter_turns_and_knows_which_is_which():
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    perfect = Answers(lambda x: 50.0 * jax.nn.one_hot(jnp.repeat(jnp.arange(4), 3), 4))
    assert rotation_objective(perfect, images, KEY) < 1e-6
    for turns in range(4):
        np.testing.assert_array_equal(perfect.asked[3 * turns : 3 * turns + 3], np.rot90(images, turns, (1, 2)))
    none = rotation_objective(Answers(lambda x: jnp.zeros((len(x), 4))), images, KEY)
    assert float(none) == pytest.approx(np.log(4))
    with pytest.raises(InputError, match="square"):
        rotation_objective(perfect, images[:, :2], KEY)


@pytest.mark.parametrize(("shape", "patch"), [((40, 30), 1), ((20, 8, 8, 3), 4)])
def test_masked_reconstruction_counts_what_was_hidden_and_nothing_else(shape, patch):
    inputs = 1 + np.random.default_rng(0).uniform(size=shape).astype(np.float32)  # no zeros
    model = Answers(lambda x: jnp.where(x == 0, inputs + 2, -100.0))  # wrong by two where hidden
    assert float(masked_objective(0.3, patch)(model, inputs, KEY)) == pytest.approx(4, rel=1e-5)
    hidden = model.asked == 0
    assert 0.2 < hidden.mean() < 0.4
    if patch > 1:
        blocks = hidden.reshape(20, 2, 4, 2, 4, 3)
        assert np.all(blocks == blocks[:, :, :1, :, :1, :1])
    with pytest.raises(InputError, match="do not divide"):
        masked_objective(0.3, 7)(model, inputs, KEY)


def test_denoising_asks_for_what_was_there_before_the_noise():
    inputs = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    assert float(denoising_objective(0.5)(Answers(lambda x: inputs + 0.1), inputs, KEY)) == pytest.approx(
        0.01, rel=1e-3
    )
    assert float(denoising_objective(0.5)(Answers(lambda x: x), inputs, KEY)) == pytest.approx(0.25, rel=0.1)


def test_entropy_is_that_of_the_predicted_classes():
    p = np.array([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]])
    entropy = entropy_objective(lambda x: jnp.log(x) + 7, jnp.asarray(p), KEY)
    assert float(entropy) == pytest.approx(0.5 * 1.5 * np.log(2), rel=1e-5)


def test_random_crops_are_shifted_copies():
    image = np.arange(1, 17, dtype=np.float32).reshape(1, 4, 4, 1)
    crops = lambda **settings: jax.jit(
        lambda x: on_random_crops(lambda model, crops, key: crops, **settings)(None, x, KEY)
    )(image)
    padded = np.pad(image[0, :, :, 0], 1)
    allowed = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    shifted, flipped = crops(copies=64, padding=1), crops(copies=9, padding=0, flip=True)
    assert {np.asarray(crop).tobytes() for crop in shifted} == allowed
    assert {np.asarray(crop).tobytes() for crop in flipped} == {image[0].tobytes(), image[0, :, ::-1].tobytes()}
