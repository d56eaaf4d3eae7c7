"""Every published learner gives what its case says: outputs, final state, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.variants import NAMES, Case, final_parts
from tttlm.ops.target import target_platform
from tttlm.ops.ttt.learn import IMPLEMENTATIONS
from tttlm.ops.ttt.problem import Shapes

PAIRS = [(name, how) for name in NAMES for how in IMPLEMENTATIONS]


def distance(found, expected, smallest=0.0):
    """The largest difference over the largest entry, or over `smallest` where that is larger."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    return np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), smallest)


def compare(case, how, dtype, tolerance, gradient_tolerance):
    given = {name: jnp.asarray(a, dtype) for name, a in case.given.items()}

    def score(given):
        out, states = case.run(given, implementation=how)
        return jnp.sum(out * case.cotangent.astype(dtype)), (out, states)

    (_, (out, states)), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(given)
    assert distance(out, case.out) < tolerance
    parts = final_parts(case, states, [call.weights for call in case.family(case, given)])
    for name, expected in case.final.items():
        assert distance(parts[name].reshape(expected.shape), expected) < tolerance, f"final/{name}"
    assert set(gradients) == set(case.gradients)
    smallest = 1e-3 * max(np.max(np.abs(g)) for g in case.gradients.values())
    for name, expected in case.gradients.items():
        assert distance(gradients[name], expected, smallest) < gradient_tolerance, f"grad/{name}"


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(pair))
def pair(request):
    name, how = request.param
    case = Case(name)
    for learner in case.learners:
        sizes = {"B": 2, "T": 50, "H": 1, "K": 8, "V": 8} | case.h
        reason = IMPLEMENTATIONS[how].supports(learner, target_platform(), Shapes(*(sizes[a] for a in "BTHKV")))
        if reason is not None:
            pytest.skip(reason)
    return case, how


def test_in_float64_it_is_the_definition(pair, x64):
    case, how = pair
    tolerance = 1e-9 if case.variant != "ttt_mlp" else 2e-9  # that source writes the GELU's derivative to eight digits
    compare(case, how, jnp.float64, tolerance, tolerance)


@pytest.mark.slow
def test_in_float32_it_is_as_exact_as_the_definition(pair):
    case, how = pair
    off = case.config["float32"]
    compare(case, how, jnp.float32, 10 * off["outputs"], 10 * off["gradients"])
