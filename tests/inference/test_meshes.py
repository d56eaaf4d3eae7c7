"""A model that is sharded over devices writes and scores the same as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MESHES = [
    ("ttt_linear", "fsdp=2,tensor=2,context=2"),
    ("attention", "tensor=4,data=2"),
    ("mamba2", "tensor=2,context=2,data=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "axes"), MESHES)
def test_a_mesh_of_eight_devices_changes_nothing(mixer, axes):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.inference.meshes", mixer, axes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["sharded"] >= 3
    assert found["mesh"]["tokens"] == found["alone"]["tokens"]
    np.testing.assert_allclose(found["mesh"]["nats"], found["alone"]["nats"], rtol=1e-4)
