"""Where the numbers of an experiment are shown besides `metrics.jsonl`: TensorBoard, Weights & Biases.

Nothing that only shows may stop training: each tracker works in a thread of its own, and one that fails or hangs is
reported in one line and left.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tttlm.training.cluster import say

_WAITING = 10_000  # lines of metrics that may wait for a tracker before it counts as hung
_PATIENCE = 10.0  # seconds that the end of a run waits for a tracker


class Sink(Protocol):
    """What a tracker writes to."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Takes the numbers of a step; may raise anything."""

    def close(self) -> None:
        """Ends it; may raise anything."""


class Tracker:
    """Passes numbers on to a sink without ever waiting for it.

    Args:
        name: the name of the tracker in messages.
        open_sink: makes the sink; called in the thread that writes to it.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name, self._open_sink = name, open_sink
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._left = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Has the numbers of a step written, some time."""
        self._put((step, numbers))

    def close(self) -> None:
        """Waits a little for what was sent to be written."""
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
        except BaseException as error:  # a tracker may even try to leave the program
            self._leave((str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _leave(self, cause: str) -> None:
        if not self._left:
            self._left = True
            say(f"{self._name} is left out from here on ({cause}); metrics.jsonl goes on")


class TensorBoard:
    """Writes event files that TensorBoard reads, in this thread and without a clock to wait by.

    Args:
        folder: where the files go.
        step: the step that the run goes on from; TensorBoard drops later ones that it has.
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
        name: the name of the run there, under which it goes on.
        config: what the run was started with, as plain values.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._wandb.finish()
