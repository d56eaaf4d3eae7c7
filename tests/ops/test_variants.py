"""Every published learner gives what its case says: outputs, final state, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.variants import NAMES, Case, final_parts
from tttlm.ops.target import target_platform
from tttlm.ops.ttt.learn import IMPLEMENTATIONS
from tttlm.ops.ttt.problem import Shapes

# What an implementation is picked for is tested always; the others, and float32, with the slow tests.
CASES = [
    pytest.param(
        (name, how, dtype),
        id=f"{name}-{how or 'picked'}-{dtype.__name__}",
        marks=[] if how is None and dtype is jnp.float64 else [pytest.mark.slow],
    )
    for name in NAMES
    for how in (None, *IMPLEMENTATIONS)
    for dtype in (jnp.float64, jnp.float32)
]


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


@pytest.mark.long
@pytest.mark.parametrize("which", CASES)
def test_it_is_the_published_learner(which):
    """In float64 to 1e-9, in float32 as exact as the definition itself."""
    name, how, dtype = which
    case = Case(name)
    sizes = {"B": 2, "T": 50, "H": 1, "K": 8, "V": 8} | case.h
    shapes = Shapes(*(sizes[axis] for axis in "BTHKV"))
    for learner in case.learners:
        reason = how and IMPLEMENTATIONS[how].supports(learner, target_platform(), shapes)
        if reason:
            pytest.skip(reason)
    if dtype is jnp.float32:
        off = case.config["float32"]
        compare(case, how, dtype, 10 * off["outputs"], 10 * off["gradients"])
        return
    tolerance = 1e-9 if case.variant != "ttt_mlp" else 2e-9  # that source writes the GELU's derivative to eight digits
    with jax.enable_x64(True):
        compare(case, how, dtype, tolerance, tolerance)
