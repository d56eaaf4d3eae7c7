"""Several real processes train as one: the same losses, each its own data, one set of files, one step to stop at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from tests.training.processes import run_together, train_all
from tests.training.small import small_config
from tests.training.test_loop import numbers, params
from tttlm.errors import InputError
from tttlm.training.checkpoint_files import saved_steps
from tttlm.training.config import TrainConfig
from tttlm.training.sharding import batch_shard

STEPS = 16


def changes(run: Path, data: Path, **more: Any) -> dict[str, Any]:
    more = {"steps": STEPS, "evaluate.every": 8, "checkpoint.every": 8} | more
    return {"run": str(run), "data.path": str(data), **more}


def losses(config: TrainConfig) -> list[float]:
    lines = numbers(config)
    return [r["loss"] for r in lines if "loss" in r] + [r["validation_loss"] for r in lines if "validation_loss" in r]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> tuple[TrainConfig, list[int]]:
    """A run in one process, and the rows that it read."""
    run = changes(tmp_path_factory.mktemp("alone") / "run", data)
    (report,) = train_all(0, [dict(run)])
    assert report["reason"] == "finished"
    return small_config(**run), report["read"]


def assert_same(config: TrainConfig, alone: TrainConfig) -> None:
    np.testing.assert_allclose(losses(config), losses(alone), rtol=1e-5)
    assert [line["step"] for line in numbers(config)] == [line["step"] for line in numbers(alone)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params(config), params(alone))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """Three runs of two processes: rows shared out, heads shared out, and one that is stopped by SIGTERM to one."""
    folder = tmp_path_factory.mktemp("two")
    reports = run_together(
        2,
        changes(folder / "rows", data),
        changes(folder / "num_heads", data, **{"mesh.fsdp": 1, "mesh.tensor": 2}),
        changes(folder / "stopped", data, stop=4),
    )
    (folder / "reports.json").write_text(json.dumps(reports))
    return folder


def reports(two: Path, run: int) -> list[dict[str, Any]]:
    return [report[run] for report in json.loads((two / "reports.json").read_text())]


@pytest.mark.long
def test_two_processes_have_the_losses_of_one_and_read_each_its_half(two, data, alone):
    config = small_config(**changes(two / "rows", data))
    assert_same(config, alone[0])
    first, second = (np.reshape(report["read"], (-1, 2))[:STEPS] for report in reports(two, 0))
    whole = np.reshape(alone[1], (-1, 4))[:STEPS]
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)


@pytest.mark.long
def test_processes_that_share_rows_read_the_same_ones(two, data, alone):
    assert_same(small_config(**changes(two / "num_heads", data)), alone[0])
    whole = alone[1][: 4 * STEPS]
    assert [report["read"][: 4 * STEPS] for report in reports(two, 1)] == [whole, whole]


@pytest.mark.long
def test_sigterm_to_one_stops_both_at_the_same_step_with_a_checkpoint_that_one_process_reads(
    two, data, alone, tmp_path
):
    ended = reports(two, 2)
    assert [(report["reason"], report["status"]) for report in ended] == [("interrupted", 75)] * 2
    step = ended[0]["step"]
    assert ended[1]["step"] == step < STEPS
    assert saved_steps(two / "stopped" / "checkpoints")[-1] == step
    shutil.copytree(two / "stopped", tmp_path / "stopped")
    config = changes(tmp_path / "stopped", data)
    assert train_all(0, [dict(config)])[0]["reason"] == "finished"
    assert_same(small_config(**config), alone[0])


@pytest.mark.slow
def test_four_processes_of_slurm_go_on_from_a_checkpoint_of_two(two, data, alone, tmp_path):
    shutil.copytree(two / "stopped", tmp_path / "stopped")
    config = changes(tmp_path / "stopped", data, **{"mesh.fsdp": 2, "mesh.tensor": 2})
    ended = run_together(4, config, launcher="slurm")
    assert [report[0]["reason"] for report in ended] == ["finished"] * 4
    assert_same(small_config(**config), alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_two_processes_pass_over_a_damaged_checkpoint(two, data, alone, tmp_path, harm):
    shutil.copytree(two / "rows", tmp_path / "rows")
    newest = tmp_path / "rows" / "checkpoints" / str(STEPS)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    config = changes(tmp_path / "rows", data)
    ended = run_together(2, config)
    assert [report[0]["reason"] for report in ended] == ["finished"] * 2
    assert len(ended[0][0]["read"]) >= 2 * STEPS // 2  # trained again from the checkpoint in the middle
    assert_same(small_config(**config), alone[0])
    assert newest.with_name(f"{STEPS}.damaged").is_dir()


@pytest.mark.slow
def test_two_processes_of_open_mpi_stop_at_a_faulty_step_with_one_report(data, tmp_path):
    config = changes(tmp_path / "run", data, **{"optimizer.learning_rate": 1e30, "model.mixers": ["ttt_linear"]})
    (first,), (second,) = run_together(2, config, launcher="ompi")
    assert first["reason"] == second["reason"] == "fault"
    assert first["message"] == second["message"]
    assert "layer 0 (ttt_linear)" in first["message"]


JOIN = """
import time
from tttlm.training.cluster import join
from tttlm.training.config import DistributedConfig
from tttlm.errors import InputError
import jax
begun = time.monotonic()
try:
    join(DistributedConfig())
    print(jax.distributed.is_initialized(), time.monotonic() - begun)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("environment", [{"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4"}])
def test_a_run_alone_waits_for_nothing_and_one_of_many_that_finds_none_is_told_what_to_give(environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "KUBER"))}
    done = subprocess.run([sys.executable, "-c", JOIN], env=clean | environment, capture_output=True, text=True)
    if environment == {"SLURM_NTASKS": "4"}:  # in the batch script itself rather than in a step
        assert "cannot find each other" in done.stdout
        assert "--distributed.coordinator HOST:PORT" in done.stdout
    else:
        joined, seconds = done.stdout.split()
        assert joined == "False"
        assert float(seconds) < 2


def shares_of(processes: list[int], fsdp: int, tensor: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each process's share of a batch, on a mesh whose devices belong to these processes, in order."""
    devices = np.array([SimpleNamespace(process_index=process) for process in processes]).reshape(1, fsdp, tensor, 1)
    mesh: Any = SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": fsdp, "tensor": tensor, "context": 1})
    shares = []
    for process in range(max(processes) + 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(batch_shard(mesh))
    return shares


def test_processes_share_a_batch_by_the_rows_that_their_devices_hold(monkeypatch):
    assert shares_of([0, 0, 1, 1], 4, 1, monkeypatch) == [(0, 2), (1, 2)]
    assert shares_of([0, 1, 0, 1], 4, 1, monkeypatch) == [(0, 2), (1, 2)]
    assert shares_of([0, 0, 1, 1], 1, 4, monkeypatch) == [(0, 1), (0, 1)]
    assert shares_of([0, 1, 2, 3], 2, 2, monkeypatch) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(InputError, match="split unevenly over the processes"):
        shares_of([0, 0, 1, 1, 2, 2], 2, 3, monkeypatch)
