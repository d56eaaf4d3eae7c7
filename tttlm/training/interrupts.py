"""Ctrl-C and SIGTERM make the loop save and stop; a second Ctrl-C stops at once.

All processes of a run stop at the same step, which JAX's preemption service, triggered by SIGTERM, chooses.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from tttlm.termination import Handler

INTERRUPTED = 130  # the exit status after Ctrl-C, as in shells
PREEMPTED = 75  # the exit status after SIGTERM: "try again later", which a scheduler can distinguish from a failure


class Interrupts:
    """The signals of this process, and whether all processes stop.

    Attributes:
        handler: Handler of the signals. Until a step was computed there is nothing to save, and the process need not
            wait for the end of a long compilation.
    """

    def __init__(self) -> None:
        self.handler = Handler(self._handle, only_notes=True)
        self._requested: signal.Signals | None = None
        self._asked = 0  # number of calls of `stop`, which grows even when steps are rolled back
        self._reached = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Records a signal; a second Ctrl-C raises KeyboardInterrupt."""
        if self._requested == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number)
        if number == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # tells the others

    def stop(self) -> bool:
        """Whether to save and stop now; called before every step, with the same result in every process."""
        self.handler.patient = self._asked > 0
        self._asked += 1
        self.handler.answered = self._requested is not None
        if jax.process_count() == 1:
            return self._requested is not None
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached

    @property
    def status(self) -> int:
        """The exit status for the signal."""
        return INTERRUPTED if self._requested == signal.SIGINT else PREEMPTED


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """Catches SIGINT and SIGTERM while the block runs.

    Python catches signals only in the main thread: in another thread none is caught, and the caller has to handle
    signals.
    """
    interrupts = Interrupts()
    # With several processes JAX catches SIGTERM.
    caught = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    with _handlers(dict.fromkeys(caught, interrupts.handler)):
        yield interrupts


@contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
