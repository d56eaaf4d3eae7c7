"""Which files a person means: files, folders and globs become a sorted list; what is passed over is named."""

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tttlm.data.config import PrepareConfig
from tttlm.data.store import BEGUN, MANIFEST, part_name
from tttlm.data.text_files import PACKED
from tttlm.errors import InputError

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        name: what it is called in messages and in the index: its path below what was named, on one line.
        path: where it is.
        size: its length in bytes.
        format: "text", "jsonl" or "parquet".
    """

    name: str
    path: Path
    size: int
    format: str


@dataclass
class PassedOver:
    """What was met and is not read.

    Attributes:
        names: reason -> up to three names.
        counts: reason -> how many.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        """Counts one more that is passed over for a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)

    def lines(self) -> Iterator[str]:
        """Gives a line to print for each reason."""
        for reason, count in self.counts.items():
            more = ", ..." if count > len(self.names[reason]) else ""
            yield f"passed over: {count:,} {reason} ({', '.join(self.names[reason])}{more})"


class _Met(NamedTuple):
    path: Path
    name: str  # below what was named, as the file system writes it


def printable(name: str) -> str:
    """Writes a file name on one line: what is no UTF-8 or cannot be printed is written as an escape."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_files(config: PrepareConfig) -> tuple[list[SourceFile], PassedOver]:
    """Finds the files that `config.source` names, each once, in the order of their names.

    Folders are entered however deep, also behind links. Names that begin with a dot are left out unless they are
    named.

    Raises:
        InputError: a name leads to no file, or a folder cannot be read.
    """
    found: dict[Path, tuple[bytes, SourceFile]] = {}
    passed = PassedOver()
    for spec in config.source:
        path = Path(spec).expanduser()
        try:
            if path.is_dir():
                met = list(_files_below(path, "", passed, set()))
            elif path.exists() and not path.is_file():
                raise InputError(f"{spec!r} is no regular file; name a file, a folder or a glob")
            else:
                met = [_Met(path, path.name)] if path.is_file() else list(_matches(path, passed))
            if not met:
                raise InputError(
                    f"no files under {spec!r} (a file, a folder, or a glob such as 'books/**/*.txt' in quotes)"
                )
            for file in sorted(met, key=lambda file: os.fsencode(file.name)):
                _add(file, config, found, passed)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            at = printable(str(getattr(error, "filename", None) or spec))
            raise InputError(f"{at} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    order = sorted(found.values(), key=lambda entry: (entry[0], str(entry[1].path)))
    return [file for _, file in order], passed


def _add(met: _Met, config: PrepareConfig, found: dict[Path, tuple[bytes, SourceFile]], passed: PassedOver) -> None:
    name, size = printable(met.name), met.path.stat().st_size
    form = config.format if config.format != "auto" else _format_of(met.path)
    real = met.path.resolve()
    if config.max_file_bytes and size > config.max_file_bytes and form == "text":
        passed.note(f"files of more than {config.max_file_bytes:,} bytes", name)
    elif real in found:
        passed.note("files that were named twice", name)
    else:
        found[real] = (os.fsencode(met.name), SourceFile(name, met.path, size, form))


def _format_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix
    return _FORMATS.get(suffix.lower(), "text")


def _files_below(folder: Path, name: str, passed: PassedOver, inside: set[tuple[int, int]]) -> Iterator[_Met]:
    """Every file of a folder; `inside` are the folders it is in, which a link may lead back to."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in inside:
        passed.note("links to a folder that they are in", printable(name))
        return
    for entry in sorted(folder.iterdir(), key=lambda entry: os.fsencode(entry.name)):
        below = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith("."):
            passed.note("hidden files or folders", printable(below))
        elif _is_prepared(entry):
            passed.note("folders of prepared tokens", printable(below))
        elif entry.is_dir():
            yield from _files_below(entry, below, passed, inside | {here})
        elif entry.is_file():
            yield _Met(entry, below)
        else:
            passed.note("links to nothing, pipes or devices", printable(below))


def _is_prepared(folder: Path) -> bool:
    """Tells whether `prepare` wrote this folder, perhaps beside the text it was made from: no text is in there."""
    return (folder / BEGUN).is_file() and any((folder / name).exists() for name in (MANIFEST, part_name(0)))


def _matches(pattern: Path, passed: PassedOver) -> Iterator[_Met]:
    """The files that a glob matches, called by their path below its fixed part."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    root = Path(*parts[:fixed])
    if fixed < len(parts) and root.is_dir():
        seen: set[str] = set()
        for met in _matching(root, "", list(parts[fixed:]), passed, set()):
            if met.name not in seen:  # two ** may reach a file in two ways
                seen.add(met.name)
                yield met


def _matching(
    folder: Path, name: str, parts: list[str], passed: PassedOver, inside: set[tuple[int, int]]
) -> Iterator[_Met]:
    if parts[0] == "**":
        rest = parts[1:] or ["*"]
        yield from _matching(folder, name, rest, passed, set())
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in inside:
            passed.note("links to a folder that they are in", printable(name))
            return
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith(".") and not _is_prepared(entry):
                below = f"{name}/{entry.name}" if name else entry.name
                yield from _matching(entry, below, parts, passed, inside | {here})
        return
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith(".") and not parts[0].startswith(".")
        if hidden or not fnmatch.fnmatchcase(entry.name, parts[0]):
            continue
        below = f"{name}/{entry.name}" if name else entry.name
        if len(parts) > 1:
            if entry.is_dir():
                yield from _matching(entry, below, parts[1:], passed, set())
        elif entry.is_file():
            yield _Met(entry, below)
        elif entry.is_dir():
            passed.note("folders that a glob matches (name them, or end it with /**)", printable(below))
        else:
            passed.note("links to nothing, pipes or devices", printable(below))
