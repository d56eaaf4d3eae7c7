"""Trackers of metrics besides `metrics.jsonl`: TensorBoard, Weights & Biases.

A tracker must not stop training: each works in a thread of its own, and one that fails or hangs is reported in one line
and turned off.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tttlm.training.cluster import say

_WAITING = 10_000  # queued lines of metrics above which a tracker counts as hung
_PATIENCE = 10.0  # seconds to wait for a tracker at the end of a run


class Sink(Protocol):
    """The output of a tracker."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes the metrics of a step; may raise anything."""

    def close(self) -> None:
        """Closes the output; may raise anything."""


class Tracker:
    """Passes metrics to a sink without waiting for it.

    Args:
        name: the name of the tracker in messages.
        open_sink: creates the sink; called in the thread that writes to it.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name, self._open_sink = name, open_sink
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._left = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Queues the metrics of a step for writing."""
        self._put((step, numbers))

    def close(self) -> None:
        """Waits a short time until the queue is written."""
        self._put(None)
        if not self._left:
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                self._leave("it does not answer")

    def _put(self, line: tuple[int, dict[str, float]] | None) -> None:
        if not self._left:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self._leave("it does not answer")

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (line := self._lines.get()) is not None:
                sink.write(*line)
            sink.close()
        except BaseException as error:  # a tracker may even raise SystemExit
            self._leave((str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _leave(self, cause: str) -> None:
        if not self._left:
            self._left = True
            say(f"{self._name} is turned off ({cause}); metrics.jsonl continues")


class TensorBoard:
    """Writes event files for TensorBoard, in this thread and without timers.

    Args:
        folder: the folder of the files.
        step: the step that the run resumes from; TensorBoard drops later ones that it has.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events"), f".{time.time_ns()}"), 0.0
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        for name, value in numbers.items():
            event = event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        if abs(time.monotonic() - self._flushed) > 10:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to a project of Weights & Biases.

    Args:
        project: the name of the project.
        name: the name of the run in the project, under which it is resumed.
        config: the configuration of the run as plain values.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._wandb.finish()
