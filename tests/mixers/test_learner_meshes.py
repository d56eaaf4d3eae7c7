"""Every learner computes on a mesh what it computes on one device, in float64: outputs and all gradients."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tttlm.mixers import mixer_names, registered

LEARNERS = [name for name in mixer_names() if registered(name).__module__.startswith("tttlm.mixers.learners")]
MESHES = ("data=2,fsdp=2", "fsdp=2,tensor=2", "data=2,context=2")
OF_ONE_HEAD = ("data=2,fsdp=2", "fsdp=4")
LOW_RANK = ("kda", "gla", "longhorn")  # the first of two projections to and from a few features is whole over tensor
CASES = [pytest.param([name], MESHES, marks=pytest.mark.slow, id=name) for name in LEARNERS if name != "inplace_ttt"]


@pytest.mark.parametrize(
    ("mixers", "meshes"),
    [
        pytest.param(["gated_deltanet"], ("fsdp=2,tensor=2",), marks=pytest.mark.long, id="one"),
        pytest.param(["attention", "inplace_ttt"], OF_ONE_HEAD, marks=pytest.mark.slow, id="inplace_ttt"),
        *CASES,
    ],
)
def test_on_a_mesh_a_learner_is_what_it_is_on_one_device(mixers, meshes):
    """Rounding alone: in float32 Newton-Schulz iterations make 5e-5 of it, which float64 tells from a fault."""
    command = [sys.executable, "-m", "tests.mixers.learner_meshes", json.dumps(mixers), *meshes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told.pop("one device")["smallest"] > 1e-6  # every parameter has a gradient
    assert set(told) == set(meshes)
    for axes, found in told.items():
        assert found["difference"] < 1e-10, axes
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
        over = math.prod(size for name, size in sizes.items() if name != "data")
        over //= sizes.get("tensor", 1) if mixers[0] in LOW_RANK else 1
        assert found["divided"] == over, axes
