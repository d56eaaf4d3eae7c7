"""Numbers reach `metrics.jsonl` whatever became of it and of those who show them."""

import errno
import json
import os
import time
from pathlib import Path

import pytest

from tests.training.small import small_config
from tttlm.errors import CannotWrite, InputError
from tttlm.training import trackers
from tttlm.training.metrics import Metrics, by_step, keep_until, read_metrics
from tttlm.training.run_folder import RunFolder
from tttlm.training.trackers import Tracker

GOOD = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n'
BAD = [b"\xff\xfe\n", b'{"step": 3, "lo\n', b"[1]\n", b'{"loss": 1.0}\n', b'{"step": "x"}\n', b'{"step": {}}\n', b"7\n"]


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_cannot_be_read_is_named_kept_aside_and_stops_nothing(tmp_path, capsys, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD[:25] + bad + GOOD[25:])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert f"{path}: skipped 1 line that cannot be read: line 2 " in capsys.readouterr().err
    keep_until(path, 1)
    assert "1 line cannot be read: line 2 " in capsys.readouterr().err
    assert path.read_bytes() == GOOD[:25]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == bad
    read_metrics(path)
    assert capsys.readouterr().err == ""


def test_a_last_line_cut_short_by_a_kill_is_dropped_without_a_word(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b'{"step": 3, "lo')
    keep_until(path, 5)
    assert path.read_bytes() == GOOD
    assert capsys.readouterr().err == ""
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_an_error_of_the_file_system_changes_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(GOOD)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("tttlm.training.metrics.read_lines", fail)
    with pytest.raises(InputError, match=r"cannot be used \(Input/output error\): nothing was changed"):
        Metrics(folder, small_config(tmp_path), 1)
    with pytest.raises(InputError, match="cannot be read: Input/output error"):
        read_metrics(folder.metrics)
    assert folder.metrics.read_bytes() == GOOD


def test_what_is_no_number_is_not_plotted():
    assert by_step([{"step": 1, "loss": "x"}, {"step": 2, "loss": 3}], "loss").tolist() == [[2.0, 3.0]]


def test_metrics_that_cannot_reach_the_disk_are_said_so(tmp_path, monkeypatch):
    metrics = Metrics(RunFolder(tmp_path), small_config(tmp_path), 0)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left"):
        metrics.flush()
    metrics.close()


class Sink:
    """Takes numbers until step 3, then does what it is told to."""

    def __init__(self, then) -> None:
        self.taken: list[int] = []
        self.then = then

    def write(self, step, numbers) -> None:
        if step == 3:
            self.then()
        self.taken.append(step)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("what", ["fails", "leaves", "hangs"])
def test_a_tracker_that_fails_or_hangs_is_left_with_one_line(capsys, monkeypatch, what):
    monkeypatch.setattr(trackers, "_WAITING", 5)
    monkeypatch.setattr(trackers, "_PATIENCE", 0.2)

    def fail() -> None:
        if what == "hangs":
            time.sleep(5)
        raise OSError(errno.ENOSPC, "No space left on device") if what == "fails" else SystemExit("bye")

    sink = Sink(fail)
    tracker = Tracker("Shows", lambda: sink)
    begun = time.monotonic()
    for step in range(1, 50):
        tracker.send(step, {"loss": 1.0})
        time.sleep(0.001)
    tracker.close()
    assert time.monotonic() - begun < 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("Shows is turned off (")
    assert sink.taken == [1, 2]


def test_tensorboard_gets_every_number_with_the_clock_set_back(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    config = small_config(tmp_path, **{"metrics.tensorboard": "on"})
    clock = [10.0**9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    metrics = Metrics(RunFolder(tmp_path), config, 0)
    for step in range(1, 200):
        clock[0] -= 3600
        metrics.write(step, {"loss": 1.0 / step})
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") == 199
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 199


def test_tensorboard_without_room_is_left_and_the_run_goes_on(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("no folder")
    metrics = Metrics(RunFolder(tmp_path), small_config(tmp_path, **{"metrics.tensorboard": "on"}), 0)
    for step in range(1, 100):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert "TensorBoard is turned off" in capsys.readouterr().err
    assert len(Path(tmp_path / "metrics.jsonl").read_text().splitlines()) == 99
