"""A journal of results, one line of JSON each, from which a stopped evaluation resumes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tttlm.errors import InputError

NAME = "documents.jsonl"


class Journal:
    """The results so far, by the key of everything they depend on.

    Args:
        folder: The folder of the journal; None keeps it only in memory.

    Raises:
        InputError: The folder cannot be written, or its journal was altered.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._found: dict[str, Any] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
            for number, line in enumerate(lines[:-1], start=1):
                self._found.update([self._parsed(line, number)])
            # A line that was incomplete when the evaluation was stopped has no newline.
            self._path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {error.strerror}: choose another --output") from None

    def get(self, key: dict[str, Any]) -> Any:
        """The stored value of a key; None if there is none."""
        return self._found.get(_named(key))

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Stores a value; it is in the file when this returns."""
        self._found[_named(key)] = value
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": _named(key), "of": key, "value": value}) + "\n")

    def _parsed(self, line: bytes, number: int) -> tuple[str, Any]:
        try:
            record = json.loads(line)
            if _named(record["of"]) == record["key"]:
                return record["key"], record["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise InputError(f"{self._path}, line {number}: was altered; remove the file, or choose another --output")


def _named(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
