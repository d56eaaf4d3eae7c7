"""Processes of their own for the parts of a comparison: they end with this one, and their peak memory is known."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tttlm.errors import InputError
from tttlm.records import read_record, write_json


@dataclass(frozen=True)
class ProcessFacts:
    """What is known of the processes that a run was trained in: their largest peak memory, in bytes."""

    peak_memory: int


def run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Runs this Python with those arguments, its output going where this process's goes.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the child, which is given the time to save and end; it hears each
    once, because it is in a process group of its own. Its standard input is a pipe that closes with this process,
    which `end_with_parent` watches.

    Returns:
        exit status, negative for a signal; peak resident memory of the process in bytes, as the system counts it.
    """
    child = subprocess.Popen(
        [sys.executable, *arguments], env=dict(environment), stdin=subprocess.PIPE, process_group=0
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        assert child.stdin is not None
        child.stdin.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return child.returncode, usage.ru_maxrss * unit


def end_with_parent() -> None:
    """Ends this process, a child of `run_child`, as soon as its parent has ended, however that happens."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the parent", daemon=True).start()


def note_peak(run: Path, peak: int) -> None:
    """Keeps the largest peak memory of the processes that a run was trained in."""
    write_json(run / "process.json", ProcessFacts(max(peak, read_peak(run) or 0)))


def read_peak(run: Path) -> int | None:
    """Bytes; None where it was not measured."""
    try:
        return read_record(run / "process.json", ProcessFacts, advice="").peak_memory
    except InputError:
        return None
