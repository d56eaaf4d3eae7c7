"""The metrics of a run: always JSON lines, and TensorBoard and Weights & Biases if installed and configured."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tttlm import progress
from tttlm.errors import CannotWrite, InputError
from tttlm.records import read_lines, write_file
from tttlm.training.cluster import is_first, say
from tttlm.training.config import MetricsConfig, TrainConfig, to_dict
from tttlm.training.run_folder import RunFolder
from tttlm.training.trackers import TensorBoard, Tracker, WeightsAndBiases

Record = dict[str, bool | int | float | str]  # always has "step"


def check_metrics(config: MetricsConfig) -> None:
    """Refuses a tracker that is configured but not installed.

    Raises:
        InputError: names the package to install.
    """
    if config.tensorboard == "on" and not importlib.util.find_spec("tensorboardX"):
        raise InputError("metrics.tensorboard is on but tensorboardX is not installed: pip install tensorboardX")
    if config.wandb and not importlib.util.find_spec("wandb"):
        raise InputError("metrics.wandb names a project but wandb is not installed: pip install wandb")


class Metrics:
    """Appends one JSON object per line, `{"step": n, ...}`, and passes the same values to the trackers.

    Args:
        folder: the run directory.
        config: the trackers to use.
        step: the step that the run resumes from. Lines of later steps are dropped, because they are computed again.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, step: int) -> None:
        if step and not folder.metrics.exists():
            say(f"{folder.metrics} is missing: metrics of the steps up to {step} are lost, those of later ones follow")
        try:
            keep_until(folder.metrics, step)
            self._file = open(folder.metrics, "ab", buffering=0)  # noqa: SIM115 (open while the run lasts)
        except OSError as error:
            raise InputError(
                f"{folder.metrics} cannot be used ({error.strerror}): nothing was changed, try again once it can be"
            ) from None
        self._whole = True  # the last line was written completely
        self._trackers: list[Tracker] = []
        wanted = config.metrics.tensorboard
        if wanted == "on" or (wanted == "auto" and importlib.util.find_spec("tensorboardX")):
            where = folder.path / "tensorboard"
            self._trackers.append(Tracker("TensorBoard", lambda: TensorBoard(where, step)))
        if project := config.metrics.wandb:
            name, values = folder.path.absolute().name, to_dict(config)
            self._trackers.append(Tracker("Weights & Biases", lambda: WeightsAndBiases(project, name, values)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes a line.

        Raises:
            CannotWrite: there is no space for it.
        """
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        line = line if self._whole else b"\n" + line
        try:
            self._whole = self._file.write(line) == len(line)
            cause = "" if self._whole else "no space for the complete line"
        except OSError as error:
            self._whole, cause = False, error.strerror or str(error)
        if cause:
            raise CannotWrite(f"step {step}: {self._file.name} cannot be written ({cause})")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.send(step, numbers)

    def flush(self) -> None:
        """Flushes all lines to disk; called before a checkpoint, so that no checkpoint is ahead of its metrics.

        Raises:
            CannotWrite: the system cannot write them.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CannotWrite(f"{self._file.name} cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Closes the file, and waits a short time for the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NoMetrics(Metrics):
    """Discards the metrics of processes other than process 0."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, values: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_metrics(folder: RunFolder, config: TrainConfig, step: int) -> Metrics:
    """The metrics of this process (see `Metrics`)."""
    return Metrics(folder, config, step) if is_first() else NoMetrics()


def read_metrics(path: Path) -> list[Record]:
    """Reads the lines of a `metrics.jsonl`. Unreadable lines are skipped and reported on standard error.

    A last line that a killed process left incomplete is skipped silently.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        records, bad, problem = _read(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if bad:
        progress.say(f"{path}: skipped {_count(bad)} that cannot be read: {problem}")
    return records


def by_step(records: list[Record], name: str) -> Float[np.ndarray, "N 2"]:
    """The steps that have a value of that name, and the values."""
    pairs = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    return np.array(pairs, float).reshape(-1, 2)


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`; unreadable lines are moved to `<name>.bad` and reported.

    Raises:
        OSError: the file cannot be read or written; it is unchanged.
    """
    if not path.exists():
        return
    records, bad, problem = _read(path)
    if bad:
        aside = path.with_name(path.name + ".bad")
        write_file(aside, (aside.read_bytes() if aside.exists() else b"") + b"".join(bad))
        say(f"{path}: {_count(bad)} cannot be read: {problem}; moved to {aside.name}")
    kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]  # type: ignore[operator]
    write_file(path, "".join(kept).encode())


def _read(path: Path) -> tuple[list[Record], list[bytes], str]:
    """The records, the unreadable lines, and what is wrong with the first of those."""
    records: list[Record] = []
    bad: list[bytes] = []
    problem = ""
    for line in read_lines(path, Record):
        step = None if line.value is None else line.value.get("step")
        if line.value is not None and isinstance(step, int) and not isinstance(step, bool):
            records.append(line.value)
        elif line.data.endswith(b"\n") and line.data.strip():
            bad.append(line.data)
            problem = problem or f"line {line.number} {line.problem or 'has no step'}"
    return records, bad, problem


def _count(lines: list[bytes]) -> str:
    return f"{len(lines)} line{'s' * (len(lines) > 1)}"
