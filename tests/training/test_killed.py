"""`kill -9` at random moments, checkpoints being written included: the run goes on as if nothing had been."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.small import small_config
from tests.training.test_loop import numbers, params
from tttlm.training.loop import train

KILLED = """
import logging, sys
from tests.training.small import small_config
from tttlm.training.loop import train
logging.getLogger("absl").setLevel(logging.CRITICAL)
train(small_config(sys.argv[1], sys.argv[2], **{"steps": int(sys.argv[3]), "checkpoint.every": 3}))
"""


@pytest.mark.slow
def test_twenty_kills_change_nothing(data, tmp_path):
    steps, rng = 2000, random.Random(0)
    config = small_config(tmp_path / "whole", data, **{"steps": steps, "checkpoint.every": 3})
    train(config)
    killed = small_config(tmp_path / "killed", data, **{"steps": steps, "checkpoint.every": 3})
    metrics = Path(killed.run) / "metrics.jsonl"
    kills = writing = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, killed.run, str(data), str(steps)],
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        if kills < 20:
            before = metrics.stat().st_size if metrics.exists() else 0
            while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) <= before + 1:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
            writing += any((Path(killed.run) / "checkpoints").glob("*tmp*"))
        if process.wait() == 0:
            break
    assert kills == 20
    assert writing > 0  # some came while a checkpoint was being written
    assert numbers(killed) == numbers(config)
    jax.tree.map(np.testing.assert_array_equal, params(killed), params(config))
