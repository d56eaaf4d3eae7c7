"""A journal of results, one line of JSON each, from which a stopped evaluation resumes."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tttlm.errors import InputError
from tttlm.records import write_file

NAME = "documents.jsonl"


class Journal:
    """The results so far, by the key of everything they depend on.

    Args:
        folder: The folder of the journal, which is made for the first result; None keeps it only in memory.

    Raises:
        InputError: The folder cannot be written, or its journal was altered.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._found: dict[str, Any] = {}
        if self._path is None:
            return
        try:
            _check_writable(self._path.parent)
            if self._path.exists():
                lines = self._path.read_bytes().split(b"\n")
                for number, line in enumerate(lines[:-1], start=1):
                    self._found.update([self._parsed(line, number)])
                # A line that was incomplete when the evaluation was stopped has no newline.
                if lines[-1]:
                    write_file(self._path, b"".join(line + b"\n" for line in lines[:-1]))
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {error.strerror}: choose another --output") from None

    def get(self, key: dict[str, Any]) -> Any:
        """The stored value of a key; None if there is none."""
        return self._found.get(_digest(key))

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Stores a value; it is in the file when this returns."""
        self._found[_digest(key)] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"digest": _digest([key, value]), "of": key, "value": value}) + "\n")

    def _parsed(self, line: bytes, number: int) -> tuple[str, Any]:
        try:
            record = json.loads(line)
            if record["digest"] == _digest([record["of"], record["value"]]):
                return _digest(record["of"]), record["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise InputError(
            f"{self._path}, line {number}: was altered, or written by another version; remove the file, or choose "
            "another --output"
        )


def _check_writable(folder: Path) -> None:
    """Raises OSError if there is no folder of that name and none can be made."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        number = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(there))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
