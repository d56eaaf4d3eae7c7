"""Where text comes from: every source is a sequence of documents in a fixed order that can be taken up anywhere."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tttlm.data.config import PrepareConfig
from tttlm.data.text_files import read_jsonl, read_parquet, read_text
from tttlm.errors import InputError

_KEEP_BYTES = 16 << 20
_PACKED = {".gz", ".zst", ".xz"}
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass
class RawDocument:
    """A document before it is tokenized.

    Attributes:
        file: number of the file within the source.
        record: number of the line or row within the file.
        key: a hash of the content, the same wherever the same bytes are met.
        chunks: its bytes, to be read once; a large file is never held whole.
    """

    file: int
    record: int
    key: int
    chunks: Iterator[bytes]


class Source(Protocol):
    """A sequence of documents.

    Attributes:
        names: what the files are called, by number; None names the records of a dataset.
        total: bytes there are to read, None when unknown.
        read: bytes read so far, of the same kind.
        empty: documents passed over so far because there is no text in them.
    """

    names: list[str]
    total: int | None
    read: int
    empty: int

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another, for the manifest."""
        ...

    def documents(self) -> Iterator[RawDocument]:
        """The documents from the present position on."""
        ...

    def position(self) -> Any:
        """Where the next document begins; something JSON can hold."""
        ...

    def seek(self, position: Any) -> None:
        """Goes to a position that `position()` gave earlier, in another process perhaps."""
        ...


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path
    size: int
    format: str


def keyed(chunks: Iterable[bytes]) -> tuple[int, int, list[bytes] | None]:
    """(key, bytes, content) of a document: 64 bits of a hash of the content, its length, and the content itself.

    The key decides on which side of the train/validation line a document is, so it has to be known before the first
    token is written. A document too large to be kept comes back as None, to be read again.
    """
    digest = hashlib.blake2b(digest_size=8)
    kept: list[bytes] | None = []
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        kept = None if kept is None or size > _KEEP_BYTES else [*kept, chunk]
    return int.from_bytes(digest.digest(), "little"), size, kept


class FileSource:
    """Text files (one document each), JSON lines and Parquet (one a record), in the order of their names."""

    def __init__(self, files: list[SourceFile], column: str) -> None:
        self.files = files
        self.names = [file.name for file in files]
        self.total: int | None = sum(file.size for file in files)
        self.read = 0
        self.empty = 0
        self._column = column
        self._next: dict[str, int] = {"file": 0, "record": 0, "offset": 0}

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0{file.format}\n".encode())
        return {"files": len(self.files), "bytes": self.total, "sha256_of_names_and_sizes": digest.hexdigest()}

    def position(self) -> dict[str, int]:
        return dict(self._next)

    def seek(self, position: dict[str, int]) -> None:
        self._next = dict(position)
        self.read = sum(file.size for file in self.files[: position["file"]])

    def documents(self) -> Iterator[RawDocument]:
        start = self._next
        before = sum(file.size for file in self.files[: start["file"]])
        for number in range(start["file"], len(self.files)):
            file = self.files[number]
            at = (start["record"], start["offset"]) if number == start["file"] else (0, 0)
            for record, offset, consumed, read in self._records(file, *at):
                # What comes after this document, known before it is handed out.
                self._next = {"file": number, "record": record + 1, "offset": offset}
                self.read = before + consumed
                key, size, content = keyed(read())
                if size:
                    yield RawDocument(number, record, key, read() if content is None else iter(content))
                else:
                    self.empty += 1
            before += file.size
            self.read = before
            self._next = {"file": number + 1, "record": 0, "offset": 0}

    def _records(self, file: SourceFile, record: int, offset: int) -> Iterator[tuple[int, int, int, Callable]]:
        """Yields (record, offset of the next, bytes of the file consumed, function that reads the document)."""
        if file.format == "text":
            if record == 0:
                yield 0, 0, file.size, lambda: read_text(file.path)
            return
        reader = read_jsonl if file.format == "jsonl" else read_parquet
        for number, after, consumed, text in reader(file.path, file.name, self._column, record, offset):
            yield number, after, consumed, lambda text=text: iter((text,) if text else ())


def open_source(config: PrepareConfig) -> Source:
    """The source a configuration names.

    Raises:
        InputError: nothing is found under that name.
    """
    config.validate()
    if config.dataset.name:
        from tttlm.data.datasets_source import DatasetSource

        return DatasetSource(config.dataset, config.column)
    files = _standard_library(config.max_file_bytes or 750_000) if config.source == ("stdlib",) else _find(config)
    if not files:
        raise InputError(f"no files to prepare under {', '.join(config.source)}")
    if not any(file.size for file in files):
        raise InputError(f"nothing to prepare: {_some(files)} {'is' if len(files) == 1 else 'are'} empty")
    return FileSource(files, config.column)


def _some(files: list[SourceFile]) -> str:
    return files[0].name if len(files) == 1 else f"all {len(files)} files ({files[0].name}, ...)"


def _standard_library(max_bytes: int) -> list[SourceFile]:
    """The source of the Python this runs on, installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "__pycache__"}.isdisjoint(parts):
            size = path.stat().st_size
            if 0 < size <= max_bytes:
                files.append(SourceFile("/".join(parts), path, size, "text"))
    return sorted(files, key=lambda file: file.name)


def _find(config: PrepareConfig) -> list[SourceFile]:
    found: dict[Path, SourceFile] = {}
    for spec in config.source:
        path = Path(spec).expanduser()
        if path.is_dir():
            root, paths = path, [p for p in path.rglob("*") if not _hidden(p.relative_to(path))]
        elif path.is_file():
            root, paths = path.parent, [path]
        else:
            root, paths = _glob(path)
        files = [p for p in paths if p.is_file()]
        if not files:
            raise InputError(
                f"no files under {spec!r} (a file, a folder, or a glob such as 'books/**/*.txt' in quotes)"
            )
        for file in files:
            size = file.stat().st_size
            form = config.format if config.format != "auto" else _format_of(file)
            if not config.max_file_bytes or size <= config.max_file_bytes or form != "text":
                found[file.resolve()] = SourceFile(file.relative_to(root).as_posix(), file, size, form)
    return sorted(found.values(), key=lambda file: (file.name, str(file.path)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _glob(pattern: Path) -> tuple[Path, list[Path]]:
    fixed = []
    for part in pattern.parts:
        if any(mark in part for mark in "*?["):
            break
        fixed.append(part)
    root = Path(*fixed) if fixed else Path()
    rest = Path(*pattern.parts[len(fixed) :]).as_posix()
    return root, list(root.glob(rest)) if rest != "." and root.is_dir() else []


def _format_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return _FORMATS.get(suffix.lower(), "text")


def sample_texts(source: Source, limit: int, held_out: Callable[[int], bool]) -> Iterator[str]:
    """A sample of the training documents for training a tokenizer: the same text whenever it is drawn.

    Of files, some are taken in an order shuffled by name, and no file gives much more than its share; of a
    dataset, the first documents are taken.
    """
    if not isinstance(source, FileSource):
        yield from _clipped(source.documents(), limit, limit, held_out)
        return
    share = max(256 * 1024, 4 * limit // len(source.files))
    for file in sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest()):
        if limit <= 0:
            return
        for text in _clipped(FileSource([file], source._column).documents(), min(share, limit), limit, held_out):
            limit -= len(text)
            yield text


def _clipped(
    documents: Iterator[RawDocument], share: int, limit: int, held_out: Callable[[int], bool]
) -> Iterator[str]:
    left = min(share, limit)
    for document in documents:
        if held_out(document.key):
            continue
        for chunk in document.chunks:
            text = chunk[:left].decode("utf-8", "ignore")
            yield text
            left -= len(chunk)
            if left <= 0:
                return
