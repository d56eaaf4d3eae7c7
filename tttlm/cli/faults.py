"""Turns every error of the system, a parser or a library into one line and an exit status.

| status | what it means |
|---|---|
| 0 | done |
| 1 | a fault of the machine or of the program: a full disk, too little memory |
| 2 | an argument, a file or a configuration cannot be used |
| 75 | stopped by SIGTERM; the same command resumes |
| 130 | stopped by Ctrl-C; the same command resumes |
| 141 | broken pipe: the reader of the output has exited |
"""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tttlm.errors import CannotWrite, InputError
from tttlm.extras import advice
from tttlm.termination import Handler, in_time

FAULT, BAD_INPUT, TERMINATED, INTERRUPTED, READER_LEFT = 1, 2, 75, 130, 141

# Errors of the operating system that a user can fix; the others are faults of the machine.
_THEIRS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "get permission, or choose another path",
    errno.EPERM: "get permission, or choose another path",
    errno.EROFS: "choose another path",
    errno.EEXIST: "choose another path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTEMPTY: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links form a cycle",
    errno.EINVAL: "choose another path",
    errno.ENXIO: "choose another path",
}
_MACHINES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "free some memory",
    errno.EIO: "check the disk",
}


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM."""


def run_command(command: Callable[[], int | None], *, kept: str = "run the same command again") -> NoReturn:
    """Runs a command and exits with the status that it returns, or after an error with one line and its status.

    Args:
        command: the work of the command.
        kept: what is kept when the command is stopped or fails by a fault of the machine, and what to do next.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may be invalid UTF-8, and terminals limited
            stream.reconfigure(errors="backslashreplace")
    status: int | str | None = FAULT
    try:
        with _sigterm(kept):
            try:
                status = command()
            except SystemExit as leaving:  # raised by --help
                status = leaving.code
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        line, status = describe(error, kept)
        if os.environ.get("TTTLM_TRACEBACK"):
            traceback.print_exception(error)
        if line and sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(line, file=sys.stderr, flush=True)
    _drop_what_nobody_reads()
    sys.exit(status)


def describe(error: BaseException, kept: str) -> tuple[str, int]:
    """The error in one line ("" if nothing is to be printed), and the exit status."""
    if isinstance(error, InputError):
        # An InputError may be caused by a fault of the machine, such as a full disk.
        by_machine = isinstance(error.__context__, OSError) and error.__context__.errno in _MACHINES
        return f"error: {one_line(str(error))}", FAULT if by_machine else BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {kept}", INTERRUPTED
    if isinstance(error, Terminated):
        return f"stopped by SIGTERM; {kept}", TERMINATED
    if isinstance(error, BrokenPipeError) and _reader_left():
        return "", READER_LEFT
    if isinstance(error, CannotWrite):
        return f"error: {one_line(str(error))}", FAULT
    if isinstance(error, ModuleNotFoundError) and (what := advice(error.name or "")):
        return f"error: {what}", BAD_INPUT
    if isinstance(error, RecursionError):
        return "error: the input is nested too deeply: look for a value that contains itself", BAD_INPUT
    text = one_line(str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        what = f" ({text})" if text and text != "std::bad_alloc" else ""
        return f"error: out of memory{what}: use a smaller batch, chunk, length or model; {kept}", FAULT
    if _in_start_of_jax(error):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({text})" if text else ""
        return (
            f"error: JAX cannot use the platform '{platforms}'{why}: change JAX_PLATFORMS",
            BAD_INPUT,
        )
    if system := _system_error(error):
        return _describe_system(system, kept)
    return f"error: {type(error).__name__}: {text}{_where(error)}; {kept}", FAULT


def one_line(text: str) -> str:
    """The text on one line, truncated to a thousand characters, without control characters."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 1000 else f"{text[:990]}..."


def _describe_system(error: OSError, kept: str) -> tuple[str, int]:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    what = " -> ".join(names) or "the system refused"
    reason = error.strerror or str(error) or type(error).__name__
    number = error.errno or 0
    if number in _THEIRS:
        return f"error: {one_line(f'{what}: {reason}: {_THEIRS[number]}')}", BAD_INPUT
    todo = f": {_MACHINES[number]}" if number in _MACHINES else ""
    return f"error: {one_line(f'{what}: {reason}{todo}')}; {kept}", FAULT


def _system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that `error` is or was caused by."""
    seen: set[int] = set()
    other: BaseException | None = error
    while other is not None and id(other) not in seen:
        if isinstance(other, OSError):
            return other
        seen.add(id(other))
        of_a_library = type(other).__module__ != "builtins" and not other.__suppress_context__
        other = other.__cause__ or (other.__context__ if of_a_library else None)
    return None


def _in_start_of_jax(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).name == "xla_bridge.py"


def _where(error: BaseException) -> str:
    """The line of this package that raised an unexpected error."""
    root = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(root) and frame.filename != __file__
    ]
    if not frames:
        return ""
    return f" ({Path(frames[-1].filename).relative_to(Path(root).parent)}, line {frames[-1].lineno})"


@contextlib.contextmanager
def _sigterm(kept: str) -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`, in the main thread, or ends the process if that takes long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, Handler(stop))
    statuses: dict[int, int] = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}
    try:
        with in_time(statuses, f"stopped within a long computation; {kept}"):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reader_left() -> bool:
    """Whether the reader of standard output or standard error has exited."""
    watched = select.poll()
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.fstat(number)
            watched.register(number, 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _drop_what_nobody_reads() -> None:
    """Prevents Python's message at exit that standard output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
