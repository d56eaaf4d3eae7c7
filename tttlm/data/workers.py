"""Tokenizing in other processes.

A worker is a plain Python process that reads tasks from its standard input and writes results to its standard
output. It exits when its input ends, so a `kill -9` of the parent leaves no orphan; it imports neither JAX nor the
caller's main module, so it starts quickly.
"""

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import numpy as np

from tttlm.data.tokenizer import Tokenizer
from tttlm.data.tokenizer_files import tokenizer_from_state, tokenizer_state
from tttlm.errors import InputError

Task = list[tuple[bytes, bool]]  # blocks of bytes; the flag says that a block begins at an allowed cut


@dataclass(frozen=True)
class Encoded:
    """The result of one block: its tokens, and whether its bytes were valid UTF-8."""

    tokens: np.ndarray
    valid: bool


def encode_task(tokenizer: Tokenizer, dtype: str, task: Task) -> list[Encoded]:
    """Encodes each block of a task; invalid UTF-8 is replaced by U+FFFD and reported.

    Raises:
        InputError: the tokenizer cannot encode a text.
    """
    texts, valid = [], []
    for data, continues in task:
        try:
            text = data.decode()
            valid.append(True)
        except UnicodeDecodeError:
            text = data.decode("utf-8", "replace")
            valid.append(False)
        texts.append((text, continues))
    try:
        encoded = tokenizer.encode_blocks(texts)
    except Exception as error:  # the packages raise bare Exception
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the tokenizer cannot encode a text ({message[:200]}); choose another tokenizer") from error
    return [Encoded(tokens.astype(dtype), ok) for tokens, ok in zip(encoded, valid, strict=True)]


class Workers:
    """Processes that encode tasks. The caller limits the number of submitted tasks, which are kept in memory."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count)
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self._processes = [_start() for _ in range(count)]
        try:
            for process in self._processes:
                _send(process.stdin, (tokenizer_state(tokenizer), dtype))
                self._idle.put(process)
        except OSError as error:
            self.close()
            raise _died(process) from error

    def submit(self, task: Task) -> "Future[list[Encoded]]":
        return self._pool.submit(self._run, task)

    def _run(self, task: Task) -> list[Encoded]:
        process = self._idle.get()
        try:
            _send(process.stdin, task)
            answer = _receive(process.stdout)
        except (EOFError, BrokenPipeError, OSError) as error:
            raise _died(process) from error
        finally:
            self._idle.put(process)  # also one that died: whoever waits for it has to end
        if isinstance(answer, str):
            raise InputError(answer)
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):  # what a process that died has not read
                        stream.close()


def _died(process: subprocess.Popen) -> InputError:
    return InputError(
        f"a tokenizing process died (status {process.wait()}; out of memory?); "
        "run the same command again to resume, with fewer --workers if memory is short"
    )


@contextmanager
def workers(tokenizer: Tokenizer, dtype: str, count: int) -> Iterator[Workers]:
    """Starts worker processes, and stops them when the block ends, also after an error."""
    pool = Workers(tokenizer, dtype, count)
    try:
        yield pool
    finally:
        pool.close()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """The main function of a worker: reads tasks from standard input and writes results until the input ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes our input
    source = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not mix with the results
    try:
        state, dtype = _receive(source)
        tokenizer = tokenizer_from_state(state)
        while True:
            task = _receive(source)
            try:
                answer: Any = encode_task(tokenizer, dtype, task)
            except InputError as error:
                answer = str(error)
            _send(answers, answer)
    except (EOFError, BrokenPipeError):
        return


def _start() -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", "from tttlm.data.workers import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _send(stream: BinaryIO | Any, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    size = struct.unpack("<Q", head)[0]
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)
