"""A run ends with the same numbers however it was stopped on the way, and stops where something is wrong."""

import errno
import os
import resource
import shutil
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from tests.training.small import small_config
from tttlm.data import Batch, open_data
from tttlm.errors import InputError
from tttlm.training import checkpoint_files, loop
from tttlm.training.checkpoint_files import load_params, pick_step, saved_steps
from tttlm.training.config import TrainConfig, to_dict
from tttlm.training.metrics import read_metrics
from tttlm.training.run_folder import RunFolder
from tttlm.training.step import Model

TIMING = ("tokens_per_second", "data_wait", "seconds")


def numbers(config: TrainConfig) -> list[dict[str, Any]]:
    """The lines of metrics without what the clock says."""
    records = read_metrics(RunFolder(config.run).metrics)
    return [{name: value for name, value in r.items() if name not in TIMING} for r in records]


def params(config: TrainConfig) -> Any:
    """The parameters at the last step."""
    return load_params(RunFolder(config.run).checkpoints, Model(config.model).shapes, config.steps)[1]


def on_batch(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Lets `action(number, batch)` see each training batch before the loop does; what it returns replaces the batch."""

    def opened(config, *, split, **options):
        loader = open_data(config, split=split, **options)
        if split == "train":
            object.__setattr__(
                loader, "iterate", lambda start: (_acted(action, n, loader) for n in range(start, 10**6))
            )
        return loader

    monkeypatch.setattr(loop, "open_data", opened)


def _acted(action: Any, number: int, loader: Any) -> Batch[np.ndarray]:
    batch = loader[number]
    return action(number, batch) or batch


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> TrainConfig:
    """A run of 12 steps that nothing stopped."""
    config = small_config(tmp_path_factory.mktemp("run") / "run", data)
    outcome = loop.train(config)
    assert (outcome.reason, outcome.step, outcome.status) == ("finished", 12, 0)
    return config


def test_a_run_learns_writes_every_step_once_and_keeps_the_last_checkpoints(finished):
    lines = numbers(finished)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == list(range(1, 13))
    assert losses[1] == pytest.approx(np.log(300), abs=0.1)
    assert losses[12] < losses[1] - 0.3
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 12]
    assert [line["tokens_seen"] for line in lines if "loss" in line] == [4 * 32 * step for step in range(1, 13)]
    flops = 3 * 4 * 32 * finished.model.flops_per_token(32)
    assert [line["flops"] for line in lines if "loss" in line] == pytest.approx([flops * s for s in range(1, 13)])
    assert saved_steps(RunFolder(finished.run).checkpoints) == [8, 12]
    assert yaml.safe_load(RunFolder(finished.run).config.read_text()) == to_dict(finished)


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 75)]
)
def test_a_stopped_run_saves_and_goes_on_with_the_same_numbers(finished, data, tmp_path, monkeypatch, number, status):
    config = small_config(tmp_path / "run", data)

    def stop(batch, _):
        if batch == 7:  # it is fetched while step 7, the one before it, is up
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        on_batch(patch, stop)
        outcome = loop.train(config)
    assert (outcome.reason, outcome.step, outcome.status) == ("interrupted", 7, status)
    assert "the same command resumes" in outcome.message
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 7

    assert loop.train(config).reason == "finished"
    assert numbers(config) == numbers(finished)
    jax.tree.map(np.testing.assert_array_equal, params(config), params(finished))


@pytest.mark.long
def test_a_run_that_is_stopped_before_its_first_step_does_not_say_that_it_saved(data, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", data)
    monkeypatch.setattr("tttlm.training.interrupts.Interrupts.stop", lambda self: True)
    outcome = loop.train(config)
    assert (outcome.reason, outcome.step) == ("interrupted", 0)
    assert outcome.message.startswith("stopped before the first step, so that there is nothing to save")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        pick_step(RunFolder(config.run).checkpoints, None)


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(finished, data, tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path / "run", data)

    def die(batch, _):
        if batch == 7:
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        on_batch(patch, die)
        with pytest.raises(SystemExit):
            loop.train(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 7, "lo')  # cut short by the kill
    loop.train(config)
    assert "resuming from step 4" in capsys.readouterr().err
    seconds = [line["seconds"] for line in read_metrics(metrics) if "loss" in line]
    assert all(a <= b for a, b in pairwise(seconds))
    assert seconds[3] > 0  # the first process's share is not forgotten
    assert seconds[4] == seconds[3]  # the first step of a process compiles
    assert numbers(config) == numbers(finished)
    jax.tree.map(np.testing.assert_array_equal, params(config), params(finished))


def test_a_finished_run_is_not_trained_further(finished):
    before = RunFolder(finished.run).metrics.read_bytes()
    assert loop.train(finished).reason == "finished"
    assert RunFolder(finished.run).metrics.read_bytes() == before


def test_another_configuration_another_process_or_other_data_is_refused(finished, data):
    with pytest.raises(InputError, match=r"another configuration \(optimizer.b1: 0.9 -> 0.5\)"):
        loop.train(small_config(finished.run, data, **{"optimizer.b1": 0.5}))
    held = RunFolder(finished.run)
    held.lock()
    with pytest.raises(InputError, match="in use by process"):
        loop.train(finished)
    held.release()
    facts = held.facts.read_text()
    held.facts.write_text(facts.replace(facts.split('"')[3], "other"))
    with pytest.raises(InputError, match="the data changed since this run started"):
        loop.train(finished)
    held.facts.write_text(facts)


def test_what_cannot_work_is_refused_before_anything_is_written(data, tmp_path):
    run = tmp_path / "run"
    for changes, says in [
        ({"model.vocab_size": 100}, "model.vocab_size = 100 is smaller than the tokenizer's"),
        ({"mesh.data": 3}, "does not fit"),
        ({"data.path": str(tmp_path / "none")}, "none"),
        ({"schedule.warmup_steps": 100}, "does not fit a run of 12 steps"),
    ]:
        with pytest.raises(InputError, match=says):
            loop.train(small_config(run, **{"data.path": str(data), **changes}))
    assert not run.exists()


def test_a_folder_that_checkpoints_cannot_be_read_back_from_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(InputError, match=r"reads '\[' in a path as part of a pattern"):
        loop.train(small_config(tmp_path / "run[1]", data))
    assert os.listdir(tmp_path) == []


def test_a_read_error_at_the_start_changes_nothing_and_the_next_start_goes_on(finished, data, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.ocp, "load_checkpointables", fail)
        with pytest.raises(InputError, match=r"12 cannot be read \(Input/output error\): nothing was changed"):
            loop.train(small_config(run, data))
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before
    assert loop.train(small_config(run, data)).step == 12


def test_training_in_a_thread_works_like_anywhere_else(finished, data, tmp_path):
    config = small_config(tmp_path / "run", data)
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(loop.train(config)))
    thread.start()
    thread.join()
    assert [outcome.reason for outcome in outcomes] == ["finished"]
    assert numbers(config) == numbers(finished)


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_layer(data, tmp_path):
    config = small_config(
        tmp_path / "run",
        data,
        **{"optimizer.learning_rate": 1e30, "checkpoint.every": 1, "model.mixers": ("ttt_linear",)},
    )
    outcome = loop.train(config)
    assert (outcome.reason, outcome.status) == ("fault", 1)
    assert outcome.message.startswith(f"step {outcome.step + 1}: loss ")
    assert "layer 0 (ttt_linear)" in outcome.message
    assert f"the last checkpoint is of step {outcome.step}" in outcome.message
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(_newest(config)))


def _newest(config: TrainConfig) -> Any:
    return load_params(Path(config.run) / "checkpoints", Model(config.model).shapes)[1]


def spoil(number: int, batch: Batch[np.ndarray]) -> Batch[np.ndarray]:
    """Batch 6 has a loss that is not finite."""
    return batch._replace(weights=np.full(batch.targets.shape, np.inf if number == 6 else 1.0, np.float32))


@pytest.mark.long
def test_a_faulty_step_is_skipped_when_asked_and_changes_nothing(data, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", data, **{"faults.policy": "skip", "evaluate.every": 0})
    on_batch(monkeypatch, spoil)
    assert loop.train(config).reason == "finished"
    lines = {line["step"]: line for line in numbers(config)}
    assert "fault" in lines[7]
    assert lines[7]["batch"] == 6
    assert lines[8]["loss"] < lines[1]["loss"]


def test_a_fault_that_there_is_no_room_to_trace_is_reported_all_the_same(data, tmp_path, monkeypatch):
    def out_of_memory(*arguments: Any) -> str:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GiB were asked for\nand more lines")

    on_batch(monkeypatch, spoil)
    monkeypatch.setattr(loop, "diagnose", out_of_memory)
    outcome = loop.train(small_config(tmp_path / "run", data, **{"evaluate.every": 0}))
    assert (outcome.reason, outcome.status) == ("fault", 1)
    said = "its origin could not be determined: RESOURCE_EXHAUSTED: 99 GiB were asked for; there is no checkpoint yet"
    assert said in outcome.message


@pytest.mark.long
def test_a_spike_of_the_gradient_norm_is_a_fault_where_it_is_configured(data, tmp_path):
    config = small_config(tmp_path / "run", data, **{"faults.spike": 0.9, "evaluate.every": 0})
    outcome = loop.train(config)  # the norm grows as the run begins
    assert (outcome.reason, outcome.step, outcome.status) == ("fault", 1, 1)
    norm = read_metrics(Path(config.run) / "metrics.jsonl")[0]["gradient_norm"]
    assert outcome.message.startswith("step 2: the gradient norm spiked to ")
    assert float(outcome.message.split("spiked to ")[1].split(":")[0]) > 0.9 * norm
    assert "everything is finite; the largest gradient is of" in outcome.message


@pytest.mark.long
def test_rolling_back_goes_on_from_the_checkpoint_with_the_batches_after_the_fault(data, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", data, **{"faults.policy": "rollback", "evaluate.every": 0})
    seen: list[int] = []

    def watch(number, batch):
        seen.append(number)
        return spoil(number, batch)

    on_batch(monkeypatch, watch)
    assert loop.train(config).reason == "finished"
    assert [line["step"] for line in numbers(config) if "loss" in line] == list(range(1, 13))
    assert seen[: seen.index(7) + 1] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert seen[-9:] == [7, 8, 9, 10, 11, 12, 13, 14, 15]  # steps 5 to 12, and one fetched ahead


def test_a_damaged_newest_checkpoint_is_announced_and_the_one_before_is_used(finished, data, tmp_path, capsys):
    config = small_config(tmp_path / "run", data)
    loop.train(small_config(tmp_path / "run", data))
    newest = tmp_path / "run" / "checkpoints" / "12"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    assert loop.train(config).reason == "finished"
    said = capsys.readouterr().err
    assert "12 is damaged" in said
    assert "resuming from step 8" in said
    assert numbers(config) == numbers(finished)
    jax.tree.map(np.testing.assert_array_equal, params(config), params(finished))


def fill_disk(checkpoint: Path, first: int, last: int, limit: int) -> Any:
    """From batch `first` to `last`, once `checkpoint` is there, no file can grow beyond `limit` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def act(number: int, batch: Batch[np.ndarray]) -> None:
        full = first <= number < last
        while full and not checkpoint.exists():
            time.sleep(0.01)
        if number == last:
            time.sleep(1)  # for the checkpoint that is being written to meet it
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if full else hard, hard))

    return act


@pytest.fixture
def room_again():
    """Whatever happens, files can grow again after the test."""
    yield
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_stops_the_run_with_the_earlier_checkpoints_intact(
    finished, data, tmp_path, monkeypatch, room_again
):
    config = small_config(tmp_path / "run", data)
    with monkeypatch.context() as patch:
        on_batch(
            patch, fill_disk(tmp_path / "run" / "checkpoints" / "4", 6, 10**6, 5000)
        )  # enough for the metrics, not for the checkpoint of step 8
        outcome = loop.train(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert (outcome.reason, outcome.step, outcome.status) == ("fault", 4, 1)
    assert "checkpoints/8 could not be written (" in outcome.message
    assert "File too large" in outcome.message
    assert "that of step 4 is intact: free some space, and the same command resumes from step 4" in outcome.message
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["4"]  # nothing is left of what could not be finished
    assert loop.train(config).reason == "finished"
    assert numbers(config) == numbers(finished)
    jax.tree.map(np.testing.assert_array_equal, params(config), params(finished))


@pytest.mark.long
@pytest.mark.parametrize("limit", [5000, 1000])  # with room for the metrics, and without
def test_a_full_disk_is_passed_over_when_told_to(finished, data, tmp_path, monkeypatch, capsys, limit, room_again):
    config = small_config(tmp_path / "run", data, **{"checkpoint.on_failure": "continue"})
    on_batch(monkeypatch, fill_disk(tmp_path / "run" / "checkpoints" / "4", 6, 11, limit))
    assert loop.train(config).reason == "finished"
    said = capsys.readouterr().err
    assert "checkpoints/8 could not be written" in said
    assert "that of step 4 is intact; continuing without it" in said
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 12]
    jax.tree.map(np.testing.assert_array_equal, params(config), params(finished))
    lines = [line["step"] for line in numbers(config) if "loss" in line]
    assert lines == list(range(1, 13)) if limit == 5000 else {1, 12} < set(lines) < set(range(1, 13))


@pytest.mark.parametrize("field", ["hidden_size", "num_layers", "vocab_size"])
def test_a_model_larger_than_the_machine_is_refused_before_anything_is_made(data, tmp_path, field):
    config = small_config(tmp_path / "run", data, **{f"model.{field}": 2**20 if field != "vocab_size" else 2**30})
    with pytest.raises(
        InputError, match=r"optimiser state take [\d,.]+ GiB of a device that has [\d,.]+: make the model"
    ):
        loop.train(config)
    assert not (tmp_path / "run").exists()
