"""One of several processes that train small runs together.

A program of its own, because a process joins others before it uses JAX:
`python -m tests.training.processes COORDINATOR COUNT INDEX RUNS` (COORDINATOR being "" where the environment tells it,
as a launcher sets it), `RUNS` being JSON: a list of the changes to `small_config`,
with `run` and `data.path` among them and perhaps `stop`: the batch at which process 1 is sent SIGTERM.
It prints, as JSON, for each run how it ended and where in the tokens each row that it trained on starts.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.small import small_config
from tttlm.data.store import Split
from tttlm.training.cluster import join
from tttlm.training.config import DistributedConfig


def train_all(index: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from tests.training.test_loop import on_batch
    from tttlm.training import loop

    reports = []
    starts: list[int] = []
    read = Split.read

    def recorded(self: Split, start: int, stop: int) -> Any:
        if self.name == "train":
            starts.append(start)
        return read(self, start, stop)

    Split.read = recorded  # type: ignore[method-assign]
    for changes in runs:
        starts.clear()
        stop = changes.pop("stop", None)

        def act(number: int, batch: Any, stop: int | None = stop) -> None:
            if stop is not None and number >= stop:
                if number == stop and index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)  # the notice takes its time to go round

        with pytest.MonkeyPatch.context() as patch:
            on_batch(patch, act)
            begun = time.monotonic()
            outcome = loop.train(small_config(**changes))
        reports.append(
            {
                "reason": outcome.reason,
                "step": outcome.step,
                "status": outcome.status,
                "message": outcome.message,
                "seconds": time.monotonic() - begun,
                "read": list(starts),
            }
        )
    return reports


def launched_by(launcher: str, port: int, count: int, index: int) -> dict[str, str]:
    """What a launcher puts into the environment of its processes, all on this machine."""
    rank = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_NTASKS": str(count)}
    variables = {
        "flags": {},
        "slurm": {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", **rank},
        "ompi": {
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": str(count),
            "OMPI_COMM_WORLD_RANK": str(index),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        },
    }
    return {"JAX_COORDINATOR_PORT": str(port), **variables[launcher]}


def run_together(
    count: int, *runs: dict[str, Any], launcher: str = "flags", timeout: float = 300
) -> list[list[dict[str, Any]]]:
    """What each of `count` processes printed; they listen on the loopback interface only.

    Args:
        launcher: how they find each other; see `launched_by`.

    Raises:
        AssertionError: a process failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.training.processes", f"127.0.0.1:{port}" if launcher == "flags" else ""]
    processes = [
        subprocess.Popen(
            [*command, str(count), str(index), json.dumps(runs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | launched_by(launcher, port, count, index),
            cwd=Path(__file__).parents[2],
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, said) in zip(processes, ended, strict=True):
        assert process.returncode == 0, said
    return [json.loads(printed.splitlines()[-1]) for printed, _ in ended]


if __name__ == "__main__":
    coordinator, count, index, runs = sys.argv[1:]
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    join(DistributedConfig("auto", coordinator, int(count), int(index)) if coordinator else DistributedConfig())
    print("\n" + json.dumps(train_all(int(index), json.loads(runs))))
