"""Processes of their own for the parts of a comparison: they end with this one, and their peak memory is known."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tttlm.training.run_folder import write_atomically


def run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Runs this Python with those arguments, sharing the terminal.

    Ctrl-C reaches the child as well; it is given the time to save and end. SIGTERM is passed on to it.

    Returns:
        exit status, negative for a signal; peak resident memory of the process in bytes, as the system counts it.
    """
    child = subprocess.Popen([sys.executable, *arguments], env=dict(environment))
    before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                _, status, usage = os.wait4(child.pid, 0)
                break
    finally:
        signal.signal(signal.SIGTERM, before)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return child.returncode, usage.ru_maxrss * unit


def end_with_parent() -> None:
    """In a child, on Linux: asks the system to end it when its parent ends, however that happens."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def note_peak(run: Path, peak: int) -> None:
    """Keeps the largest peak memory of the processes that a run was trained in."""
    write_atomically(run / "process.json", json.dumps({"peak_memory": max(peak, read_peak(run) or 0)}) + "\n")


def read_peak(run: Path) -> int | None:
    """Bytes; None where it was not measured."""
    try:
        return json.loads((run / "process.json").read_text(encoding="utf-8"))["peak_memory"]
    except (OSError, ValueError, KeyError):
        return None
