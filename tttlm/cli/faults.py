"""The one place where what the system, a parser or a library raises becomes one line and an exit status.

| status | what it means |
|---|---|
| 0 | done |
| 1 | a fault of the machine or of the program: a full disk, too little memory |
| 2 | something a person named or configured cannot be used |
| 75 | stopped by SIGTERM; the same command goes on |
| 130 | stopped by Ctrl-C; the same command goes on |
| 141 | whoever read the output left, as `head` does |
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

FAULT, BAD_INPUT, TERMINATED, INTERRUPTED, READER_LEFT = 1, 2, 75, 130, 141

# What a person does about errors of the operating system; the others are the machine's.
_THEIRS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "ask for permission, or choose another path",
    errno.EPERM: "ask for permission, or choose another path",
    errno.EROFS: "choose another path",
    errno.EEXIST: "choose another path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTEMPTY: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle",
    errno.EINVAL: "choose another path",
    errno.ENXIO: "choose another path",
}
_MACHINES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "free some memory",
    errno.EIO: "look after the disk",
}


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM."""


def run_command(command: Callable[[], int | None], *, kept: str = "the same command starts again") -> NoReturn:
    """Leaves the process with the status that `command` returns, or the one of the table above and one line.

    Args:
        command: does the work.
        kept: what a command that was stopped, or met a fault of the machine, has kept and what to do next.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name need not be UTF-8, nor a terminal show all of it
            stream.reconfigure(errors="backslashreplace")
    status: int | str | None = FAULT
    try:
        with _sigterm():
            try:
                status = command()
            except SystemExit as leaving:  # of --help
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
    """One line for a person (empty where there is nothing to say), and the exit status."""
    if isinstance(error, InputError):
        # What was named may be fine, and the machine at fault: a full disk is one wherever it is met.
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
        return "error: what was read nests too deeply: look for a value that holds itself", BAD_INPUT
    text = one_line(str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        what = f" ({text})" if text and text != "std::bad_alloc" else ""
        return f"error: out of memory{what}: take a smaller batch or model; {kept}", FAULT
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
    """The text on one line, at most a thousand characters of it, and none that a terminal acts on."""
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
    """The error of the operating system that `error` is or came of."""
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
    """The line of this package that an unforeseen error came from."""
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
def _sigterm() -> Iterator[None]:
    """SIGTERM is raised as `Terminated` inside, in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reader_left() -> bool:
    """Whether it is the standard output or error that nobody reads any more."""
    watched = select.poll()
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.fstat(number)
            watched.register(number, 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _drop_what_nobody_reads() -> None:
    """Keeps Python from complaining at its end that the standard output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
