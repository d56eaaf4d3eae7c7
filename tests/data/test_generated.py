"""Generated sequences: a batch is a function of seed, split and step, and only answers have weight."""

import dataclasses

import numpy as np
import pytest

from tttlm.data import DataConfig, open_data
from tttlm.data.config import GeneratedConfig, PrepareConfig
from tttlm.errors import InputError

CONFIG = DataConfig(generated=GeneratedConfig(tasks=("mqar", "copy"), lengths=(9, 17, 33)))


def opened(config: DataConfig = CONFIG, **changes):
    arguments = {"split": "train", "batch_size": 8, "sequence_length": 32, "seed": 0, "align": 16, **changes}
    return open_data(config, **arguments)


def test_every_answer_is_a_target_once_and_stands_in_the_context():
    batch = opened(batch_size=64)[3]
    assert batch.segment_ids is None
    kinds = set()
    for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        asked = np.flatnonzero(weights)
        length = asked[-1] + 1
        np.testing.assert_array_equal(inputs[1:length], targets[: length - 1])
        assert not inputs[length:].any()
        if (np.diff(asked) == 2).all():  # key, value, key, value
            context = inputs[1 : asked[0]].reshape(-1, 2)
            assert len(asked) == len(context) == {8: 2, 16: 4, 32: 8}[length]
            assert dict(context.tolist()) == dict(zip(inputs[asked].tolist(), targets[asked].tolist(), strict=True))
            kinds.add(("mqar", length))
        else:
            np.testing.assert_array_equal(inputs[1 : len(asked) + 1], targets[asked])
            kinds.add(("copy", length))
    assert len(kinds) == 6  # every task at every length


def test_a_batch_depends_on_seed_split_and_step_alone():
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)
    whole = opened()[5]
    assert same(whole, opened()[5])
    parts = [opened(process_index=i, process_count=2)[5] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
    for other in (opened()[6], opened(seed=1)[5], opened(split="validation")[5]):
        assert not same(whole, other)
    assert same(opened(split="validation")[5], opened(split="validation", seed=1)[5])
    assert opened().fingerprint != opened(split="validation").fingerprint


def test_what_cannot_be_generated_is_one_line():
    with pytest.raises(InputError, match="which takes a sequence_length of 32, got 16"):
        opened(sequence_length=16)
    for changes in ({"path": "folder"}, {"layout": "packed"}, {"prepare": PrepareConfig(source=("a",))}):
        with pytest.raises(InputError, match="generated sequences take the place of text"):
            opened(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(InputError, match="at least one length"):
        opened(DataConfig(generated=GeneratedConfig(tasks=("copy",), lengths=())))
