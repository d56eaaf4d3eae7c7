"""The answer to SIGTERM while the main thread is within a long call, such as the compilation of a large program.

Python runs the handler of a signal between two instructions of the main thread, so that a handler waits until such a
call returns; a scheduler may have killed the process by then. Another thread hears the signal at once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

GRACE = 10.0  # seconds that the main thread is given


class Handler:
    """A handler of SIGTERM or SIGINT that is to be answered within `GRACE` seconds, or the process ends without it.

    The process ends as if it were killed, so that files are complete or missing, as after a crash.

    Args:
        run: what the handler does.
        only_notes: whether `run` only notes the signal, so that whoever reads the note sets `answered`.

    Attributes:
        patient: Whether to wait for the main thread however long it takes, because it has something to save.
        answered: Whether the signal was answered.
    """

    def __init__(self, run: Callable[[int, FrameType | None], None], *, only_notes: bool = False) -> None:
        self._run, self._only_notes = run, only_notes
        self.patient = self.answered = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.answered = not self._only_notes
        self._run(number, frame)


@contextmanager
def in_time(statuses: Mapping[int, int], line: str) -> Iterator[None]:
    """A context in which a signal that its `Handler` does not answer in time ends the process; for the main thread.

    Args:
        statuses: exit status for each signal.
        line: what is printed on standard error.
    """
    receives, sends = os.pipe()
    os.set_blocking(sends, False)
    ended = threading.Event()

    def watch() -> None:
        while heard := os.read(receives, 1):
            handler = signal.getsignal(heard[0])
            if heard[0] not in statuses or not isinstance(handler, Handler) or ended.wait(GRACE):
                continue
            if not handler.answered and not handler.patient:
                with suppress(OSError):
                    os.write(2, f"{line}\n".encode(errors="replace"))
                os._exit(statuses[heard[0]])
        os.close(receives)

    before = signal.set_wakeup_fd(sends, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="hears signals", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(sends)
