"""Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it
PREEMPTED = 75  # the exit status after SIGTERM: "try again later", so a scheduler can tell it from a failure


class Interrupts:
    """`requested` is the signal that arrived, or None."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)

    @property
    def status(self) -> int:
        """The exit status that tells which signal it was."""
        return PREEMPTED if self.requested == signal.SIGTERM else INTERRUPTED


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """Catches SIGINT and SIGTERM while the block runs."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
