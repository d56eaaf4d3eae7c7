"""Child processes for the parts of a comparison: they end with this process, and their peak memory is measured."""

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
    """The largest peak memory, in bytes, of the processes that a run was trained in."""

    peak_memory: int


def run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Runs this Python with those arguments; the child inherits standard output and standard error.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the child, which is given the time to save and exit; it gets each
    signal once, because it is in a process group of its own. Its standard input is a pipe that closes with this
    process, which `end_with_parent` watches.

    Returns:
        The exit status, negative for a signal, and the peak resident memory of the child in bytes, as the system
        reports it.
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
    """Makes this process, a child of `run_child`, exit as soon as its parent has ended for any reason."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the parent", daemon=True).start()


def note_peak(run: Path, peak: int) -> None:
    """Stores the largest peak memory of the processes that a run was trained in."""
    write_json(run / "process.json", ProcessFacts(max(peak, read_peak(run) or 0)))


def read_peak(run: Path) -> int | None:
    """The stored peak memory in bytes; None if it was not measured."""
    try:
        return read_record(run / "process.json", ProcessFacts, advice="").peak_memory
    except InputError:
        return None
