"""Writing a prepared folder: the lock against a second writer, and shards that are published atomically."""

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tttlm.data.store import (
    DOCUMENT,
    PART,
    SPLITS,
    Counts,
    FileState,
    Part,
    PartFacts,
    Sums,
    facts_of_file,
    part_name,
)
from tttlm.errors import InputError
from tttlm.progress import say
from tttlm.records import sync_folder, write_sealed


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks the folder for one writer; the lock ends with the process, also when it is killed.

    If the file system does not support `flock`, a file with the id of the process is used as the lock.

    Raises:
        InputError: another process holds the lock and `wait` is not set.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock: filelock.BaseFileLock = filelock.FileLock(folder / ".lock")
    try:
        with warnings.catch_warnings(action="ignore"):  # about the missing support for flock
            _acquire(lock, folder, wait)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        lock = filelock.SoftFileLock(folder / ".lock-by-name")
        _acquire(lock, folder, wait)
    try:
        yield
    finally:
        lock.release()


_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def _acquire(lock: Any, folder: Path, wait: bool) -> None:
    import filelock

    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise InputError(
                f"{folder} is being prepared by another process; wait for it, or choose another folder"
            ) from None
        say(f"waiting for the process that prepares {folder}")
        lock.acquire(poll_interval=0.2)


class PartWriter:
    """Writes one shard under a hidden name; `commit` publishes it."""

    def __init__(self, folder: Path, number: int, dtype: str, identity: str) -> None:
        self.final = folder / part_name(number)
        self._number, self._identity = number, identity
        self._folder = folder / f".{part_name(number)}.tmp"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._dtype = dtype
        self._tokens = {split: (self._folder / f"{split}.tokens").open("wb") for split in SPLITS}
        self._documents: dict[str, list[tuple[int, int, int, int, int]]] = {split: [] for split in SPLITS}
        self._names: dict[str, int] = {}

    def write(self, split: str, tokens: np.ndarray) -> None:
        self._tokens[split].write(np.ascontiguousarray(tokens, self._dtype).data)

    def offset(self, split: str) -> int:
        """Bytes of tokens so far, a position that `cut` can return to."""
        return self._tokens[split].tell()

    def cut(self, split: str, offset: int) -> None:
        """Truncates the tokens to `offset` bytes."""
        self._tokens[split].seek(offset)
        self._tokens[split].truncate()

    def end_document(self, split: str, tokens: int, size: int, key: int, name: str, record: int) -> None:
        file = self._names.setdefault(name, len(self._names))
        self._documents[split].append((tokens, size, key, record, file))

    def commit(self, position: Any, counts: Counts) -> tuple[Part, PartFacts, dict[str, FileState]]:
        """Publishes the shard by renaming it.

        Args:
            position: the position in the source after it.
            counts: counts of its irregular documents.

        Returns:
            Its part.json, its entry in the manifest, and the state of each file when its digest was computed.
        """
        splits, files = {}, {}
        states: dict[str, FileState] = {}
        for split in SPLITS:
            documents = np.array(self._documents[split], DOCUMENT)
            splits[split] = Sums(len(documents), int(documents["tokens"].sum()), int(documents["bytes"].sum()))
            stream = self._tokens[split]
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            with open(self._folder / f"{split}.documents", "wb") as index:
                index.write(documents.tobytes())
                index.flush()
                os.fsync(index.fileno())
            for name in (f"{split}.tokens", f"{split}.documents"):
                files[name], states[name] = facts_of_file(self._folder / name)
        part = Part(self._number, self._identity, splits, files, list(self._names), position, counts)
        write_sealed(self._folder / PART, part)
        own, states[PART] = facts_of_file(self._folder / PART)
        os.rename(self._folder, self.final)
        sync_folder(self.final.parent)
        return part, PartFacts(splits, {**files, PART: own}), states

    def discard(self) -> None:
        for stream in self._tokens.values():
            stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)
