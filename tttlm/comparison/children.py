"""Child processes for the parts of a comparison: they end with this process, and their peak memory is measured."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tttlm.errors import InputError
from tttlm.records import read_record, write_sealed


@dataclass(frozen=True)
class ProcessFacts:
    """The processes that a run was trained in.

    Attributes:
        peak_memory: their largest peak memory in bytes.
        jobs: the largest number of runs that were trained at the same time.
    """

    peak_memory: int
    jobs: int = 1


def run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Runs this Python with those arguments, see `run_children`; returns its exit status and its peak memory."""
    ((_, status, peak),) = run_children([arguments], environment)
    return status, peak


def run_children(
    commands: Iterable[Sequence[str]], environment: Mapping[str, str], jobs: int = 1
) -> Generator[tuple[int, int, int], None, None]:
    """Runs this Python with each of these arguments; the children inherit standard output and standard error.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the children, which are given the time to save and exit; each gets each
    signal once, because it is in a process group of its own. Its standard input is a pipe that closes with this
    process, which `end_with_parent` watches. After a signal no further child is started, and one that changed the
    status of no child is raised again at the end. If the iterator is closed before its end, the remaining children get
    SIGTERM, and their end is waited for.

    Args:
        commands: the arguments of each child; they are taken one by one, when a child can start.
        environment: the environment of the children.
        jobs: the largest number of children at a time.

    Yields:
        The number of a command, from 0, when its child has ended; the exit status, negative for a signal; and the peak
        resident memory of the child in bytes, as the system reports it.
    """
    waiting = enumerate(commands)
    children: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    stopped, answered = 0, False

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        nonlocal stopped
        stopped = number
        for pid in children:
            # `Popen.send_signal` would take the status of a child that has ended away from `_wait`.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            while not stopped and len(children) < jobs and (command := next(waiting, None)) is not None:
                number, arguments = command
                child = subprocess.Popen(
                    [sys.executable, *arguments], env=dict(environment), stdin=subprocess.PIPE, process_group=0
                )
                children[child.pid] = number, child
                if stopped:  # while this one was started
                    os.kill(child.pid, stopped)
            if not children:
                break
            ended = _wait(children)
            answered |= bool(stopped and ended[1])
            yield ended
    finally:
        if children and not stopped:
            pass_on(signal.SIGTERM)
        while children:
            _wait(children)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped and not answered:  # by no child: between two of them, or at the end of the last
        signal.raise_signal(stopped)


def _wait(children: dict[int, tuple[int, subprocess.Popen[bytes]]]) -> tuple[int, int, int]:
    """Waits until one of the children ends, and removes it."""
    while True:
        for pid, (number, child) in children.items():
            ended, status, usage = os.wait4(pid, os.WNOHANG if len(children) > 1 else 0)
            if ended:
                del children[pid]
                assert child.stdin is not None
                child.stdin.close()
                child.returncode = os.waitstatus_to_exitcode(status)
                unit = 1 if sys.platform == "darwin" else 1024
                return number, child.returncode, usage.ru_maxrss * unit
        time.sleep(0.05)


def end_with_parent() -> None:
    """Makes this process, a child of `run_child`, exit as soon as its parent has ended for any reason."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the parent", daemon=True).start()


def note_process(run: Path, peak: int, jobs: int = 1) -> None:
    """Stores the peak memory in bytes of a process that trained a run, and the number of runs trained together."""
    before = read_process(run) or ProcessFacts(0)
    write_sealed(run / "process.json", ProcessFacts(max(peak, before.peak_memory), max(jobs, before.jobs)))


def read_process(run: Path) -> ProcessFacts | None:
    """The stored facts; None if nothing was measured."""
    try:
        return read_record(run / "process.json", ProcessFacts, advice="", sealed=True)
    except InputError:
        return None
