"""A description is checked when it is made, and what comes in when it is used."""

import jax.numpy as jnp
import pytest

from tttlm.errors import InputError
from tttlm.ops.ttt.description import Clocks, Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.learn import learn
from tttlm.ops.ttt.learner_state import LearnerInputs
from tttlm.ops.ttt.losses import dot
from tttlm.ops.ttt.models import MLP
from tttlm.ops.ttt.transforms import InitialNorm, Muon

BAD = {
    "at least 1": lambda: Learner(window=0),
    "moves at a step": lambda: Learner(clocks=Clocks(anchor=6, step=4)),
    "multiple of anchor": lambda: Learner(clocks=Clocks(anchor=4, reset=6)),
    "needs a link": lambda: Learner(keep_link=True),
    "link_initial": lambda: Learner(link=InitialNorm(), link_initial=False),
    "since the last reset": lambda: Learner(query_projection="reset"),
    "since the anchor moved": lambda: Learner(query_projection="anchor", clocks=Clocks(anchor=None)),
    "one write each": lambda: Learner(window=3, clocks=Clocks(writes_per_token=2)),
    "Ridge solves": lambda: Learner(optimizer=Ridge(), loss=dot),
    "Ridge weighs": lambda: Learner(optimizer=Ridge(decay=Gate(per_channel=True))),
    "decay_first": lambda: Learner(optimizer=Optimizer(decay=Gate(), decay_first=True), clocks=Clocks(anchor=4)),
    "gate per channel": lambda: Learner(model=MLP((8,)), optimizer=Optimizer(decay=Gate(per_channel=True))),
    "implicit step": lambda: Learner(model=MLP((8,)), optimizer=Optimizer(implicit=True)),
    "plain steps": lambda: Learner(optimizer=Optimizer(transform=Muon()), clocks=Clocks(writes_per_token=2)),
    "step_size": lambda: Learner(optimizer=Optimizer(step_size=True), clocks=Clocks(anchor=4, step=4)),
    "needs rate 'token'": lambda: Learner(optimizer=Optimizer(rate="value"), window=2),
    "position_scale counts": lambda: Learner(optimizer=Optimizer(position_scale=True), clocks=Clocks(anchor=None)),
    "position_scale steps": lambda: Learner(
        optimizer=Optimizer(position_scale=True, decay=Gate()), clocks=Clocks(anchor=4)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_has_no_meaning_is_refused_when_the_description_is_made(message):
    with pytest.raises(InputError, match=message):
        BAD[message]()


def test_equal_descriptions_are_one_key():
    make = lambda: Learner(MLP((8,)), optimizer=Optimizer(transform=Muon(), momentum=Gate()), clocks=Clocks(anchor=8))
    assert len({make(), make(), Learner()}) == 2


def test_what_does_not_fit_is_named():
    learner = Learner()
    token = jnp.ones((2, 6, 3, 4))
    weights = learner.model.init(jnp.zeros(2, jnp.uint32), 3, 4, 4)
    inputs = LearnerInputs(token, token, token, token[..., 0])
    for wrong, message in (
        (inputs._replace(keys=token[:, :5]), "keys must have shape"),
        (inputs._replace(rates=token), "rates must have shape"),
        (inputs._replace(momentum=token[..., 0]), "momentum must have shape None"),
        (inputs._replace(error_keys=token), "error_keys must have shape None"),
    ):
        with pytest.raises(InputError, match=message):
            learn(learner, wrong, weights)
    with pytest.raises(InputError, match="implementation must be one of"):
        learn(learner, inputs, weights, implementation="fast")
    with pytest.raises(InputError, match=r"weights\[0\].kernel must have shape"):
        learn(learner, inputs, learner.model.init(jnp.zeros(2, jnp.uint32), 2, 4, 4))
