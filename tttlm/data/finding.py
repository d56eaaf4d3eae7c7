"""Resolves files, folders and globs to a sorted list of files; skipped ones are counted and named."""

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tttlm.data.config import PrepareConfig
from tttlm.data.store import MANIFEST, PREPARATION, part_name
from tttlm.data.text_files import PACKED
from tttlm.errors import InputError

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        name: its name in messages and in the index: the path relative to the source, on one line.
        path: the path of the file.
        size: its length in bytes.
        format: "text", "jsonl" or "parquet".
    """

    name: str
    path: Path
    size: int
    format: str


@dataclass
class Skipped:
    """The files and folders that are skipped.

    Attributes:
        names: reason -> up to three names.
        counts: reason -> number of files and folders.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        """Counts a file or folder that is skipped for a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)

    def lines(self) -> Iterator[str]:
        """Yields a line to print for each reason."""
        for reason, count in self.counts.items():
            more = ", ..." if count > len(self.names[reason]) else ""
            yield f"skipped: {count:,} {reason} ({', '.join(self.names[reason])}{more})"


class _Entry(NamedTuple):
    path: Path
    name: str  # relative to the source, as the file system spells it


def printable(name: str) -> str:
    """A file name on one line: bytes that are not UTF-8 and unprintable characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_files(config: PrepareConfig) -> tuple[list[SourceFile], Skipped]:
    """Finds the files that `config.source` names, each once, in the order of their names.

    Folders are read recursively, and links to folders are followed. Files whose names begin with a dot are skipped
    unless `config.source` names them.

    Raises:
        InputError: a name matches no file, or a folder cannot be read.
    """
    files: dict[Path, tuple[bytes, SourceFile]] = {}
    skipped = Skipped()
    for spec in config.source:
        path = Path(spec).expanduser()
        try:
            if path.is_dir():
                entries = list(_files_below(path, "", skipped, set()))
            elif path.exists() and not path.is_file():
                raise InputError(f"{spec!r} is not a regular file; name a file, a folder or a glob")
            else:
                entries = [_Entry(path, path.name)] if path.is_file() else list(_matches(path, skipped))
            if not entries:
                raise InputError(
                    f"no files under {spec!r} (a file, a folder, or a glob such as 'books/**/*.txt' in quotes)"
                )
            for file in sorted(entries, key=lambda file: os.fsencode(file.name)):
                _add(file, config, files, skipped)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            at = printable(str(getattr(error, "filename", None) or spec))
            raise InputError(f"{at} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    order = sorted(files.values(), key=lambda entry: (entry[0], str(entry[1].path)))
    return [file for _, file in order], skipped


def _add(entry: _Entry, config: PrepareConfig, files: dict[Path, tuple[bytes, SourceFile]], skipped: Skipped) -> None:
    name, size = printable(entry.name), entry.path.stat().st_size
    form = config.format if config.format != "auto" else _format_of(entry.path)
    real = entry.path.resolve()
    if config.max_file_bytes and size > config.max_file_bytes and form == "text":
        skipped.note(f"files of more than {config.max_file_bytes:,} bytes", name)
    elif real in files:
        skipped.note("files that were named twice", name)
    else:
        files[real] = (os.fsencode(entry.name), SourceFile(name, entry.path, size, form))


def _format_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix
    return _FORMATS.get(suffix.lower(), "text")


def _files_below(folder: Path, name: str, skipped: Skipped, inside: set[tuple[int, int]]) -> Iterator[_Entry]:
    """Every file of a folder; `inside` are its parent folders, which a link may lead back to."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in inside:
        skipped.note("links to a folder that they are in", printable(name))
        return
    for entry in sorted(folder.iterdir(), key=lambda entry: os.fsencode(entry.name)):
        below = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith("."):
            skipped.note("hidden files or folders", printable(below))
        elif _is_prepared(entry):
            skipped.note("folders of prepared tokens", printable(below))
        elif entry.is_dir():
            yield from _files_below(entry, below, skipped, inside | {here})
        elif entry.is_file():
            yield _Entry(entry, below)
        else:
            skipped.note("broken links, pipes or devices", printable(below))


def _is_prepared(folder: Path) -> bool:
    """Whether `prepare` wrote this folder, which then has no text (it may be next to the text it was made from)."""
    return (folder / PREPARATION).is_file() and any((folder / name).exists() for name in (MANIFEST, part_name(0)))


def _matches(pattern: Path, skipped: Skipped) -> Iterator[_Entry]:
    """The files that a glob matches, named by their path relative to its fixed part."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    root = Path(*parts[:fixed])
    if fixed < len(parts) and root.is_dir():
        seen: set[str] = set()
        for entry in _matching(root, "", list(parts[fixed:]), skipped, set()):
            if entry.name not in seen:  # two ** may match a file twice
                seen.add(entry.name)
                yield entry


def _matching(
    folder: Path, name: str, parts: list[str], skipped: Skipped, inside: set[tuple[int, int]]
) -> Iterator[_Entry]:
    if parts[0] == "**":
        rest = parts[1:] or ["*"]
        yield from _matching(folder, name, rest, skipped, set())
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in inside:
            skipped.note("links to a folder that they are in", printable(name))
            return
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith(".") and not _is_prepared(entry):
                below = f"{name}/{entry.name}" if name else entry.name
                yield from _matching(entry, below, parts, skipped, inside | {here})
        return
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith(".") and not parts[0].startswith(".")
        if hidden or not fnmatch.fnmatchcase(entry.name, parts[0]):
            continue
        below = f"{name}/{entry.name}" if name else entry.name
        if len(parts) > 1:
            if entry.is_dir():
                yield from _matching(entry, below, parts[1:], skipped, set())
        elif entry.is_file():
            yield _Entry(entry, below)
        elif entry.is_dir():
            skipped.note("folders that a glob matches (name them, or end it with /**)", printable(below))
        else:
            skipped.note("broken links, pipes or devices", printable(below))
