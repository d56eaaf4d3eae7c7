"""The numbers of a run: JSON lines always, TensorBoard and Weights & Biases where they are installed and wanted."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tttlm.errors import CannotWrite, InputError
from tttlm.training.cluster import is_first
from tttlm.training.config import MetricsConfig, TrainConfig, to_dict
from tttlm.training.run_folder import RunFolder, write_atomically


def check_metrics(config: MetricsConfig) -> None:
    """Refuses a tracker that is asked for and not installed.

    Raises:
        InputError: says what to install.
    """
    if config.tensorboard == "on" and not importlib.util.find_spec("tensorboardX"):
        raise InputError("metrics.tensorboard is on but tensorboardX is not installed: pip install tensorboardX")
    if config.wandb and not importlib.util.find_spec("wandb"):
        raise InputError("metrics.wandb names a project but wandb is not installed: pip install wandb")


class Metrics:
    """Appends one JSON object a line, `{"step": n, ...}`, and passes the same numbers to the trackers.

    Args:
        folder: the run's folder.
        step: the step the run goes on from. Lines of later steps are of a future that is computed again: dropped.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, step: int) -> None:
        keep_until(folder.metrics, step)
        self._file = open(folder.metrics, "ab", buffering=0)  # noqa: SIM115 (open while the run lasts)
        self._whole = True  # the last line was written to its end
        self._tensorboard: Any = None
        self._wandb: Any = None
        wanted = config.metrics.tensorboard
        if wanted == "on" or (wanted == "auto" and importlib.util.find_spec("tensorboardX")):
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1 if step else None)
        if config.metrics.wandb:
            import wandb

            name = folder.path.name
            self._wandb = wandb.init(
                project=config.metrics.wandb, name=name, id=name, resume="allow", config=to_dict(config)
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes a line.

        Raises:
            CannotWrite: there is no room for it.
        """
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        line = line if self._whole else b"\n" + line
        try:
            self._whole = self._file.write(line) == len(line)
            cause = "" if self._whole else "no room for the whole line"
        except OSError as error:
            self._whole, cause = False, error.strerror or str(error)
        if cause:
            raise CannotWrite(f"step {step}: {self._file.name} cannot be written ({cause})")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Puts what was written so far safely on disk; called before a checkpoint, so that none is ahead of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoMetrics(Metrics):
    """What a process has that is not the first: its numbers are the first one's."""

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a killed process is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
        write_atomically(path, "".join(kept))
