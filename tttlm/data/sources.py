"""Sources of text: each is a sequence of documents in a fixed order that can be resumed anywhere."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tttlm.data.config import PrepareConfig
from tttlm.data.finding import Skipped, SourceFile, find_files
from tttlm.data.raw_document import FileDigests, RawDocument, Source, keyed
from tttlm.data.store import file_state
from tttlm.data.text_files import opened, read_jsonl, read_parquet, read_text
from tttlm.errors import InputError

_SEARCH_BYTES = 1 << 16  # the held-out end of a file begins at a line, if there is one within these bytes


class FileSource:
    """Text files (one document each), JSON lines and Parquet (one a record), in the order of their names.

    Args:
        files: the files to read.
        column: the field of a record that holds the text.
        skipped: the files and folders that are skipped.
        tail: the fraction at the end of a text file that is a document of the validation split; 0 for none.
    """

    def __init__(self, files: list[SourceFile], column: str, skipped: Skipped | None = None, tail: float = 0.0) -> None:
        self.files = files
        self.names = [file.name for file in files]
        self.total: int | None = sum(file.size for file in files)
        self.read = 0
        self.empty = 0
        self.skipped = skipped or Skipped()
        self.digests: FileDigests = {}
        self._column, self._tail = column, tail
        self._next: dict[str, int] = {"file": 0, "record": 0, "offset": 0}

    def fingerprint(self, digests: FileDigests) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in self.files:
            path = str(file.path.absolute())
            try:
                state, content = file_state(file.path), ""
                if path in digests and digests[path][0] == state:
                    content = digests[path][1]
                else:
                    if file.format != "parquet":
                        with opened(file.path):  # refuses files that are not text, before anything is written
                            pass
                    with open(file.path, "rb") as stream:
                        content = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise InputError(f"{file.name} cannot be read: {error.strerror}") from error
            self.digests[path] = (state, content)
            digest.update(f"{file.name}\0{file.size}\0{file.format}\0{content}\n".encode())
        return {"files": len(self.files), "bytes": self.total, "sha256": digest.hexdigest()}

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
            yield from self._documents_of(number, file, before, *at)
            before += file.size
            self.read = before
            self._next = {"file": number + 1, "record": 0, "offset": 0}
            self._refuse_changed(file)

    def _documents_of(
        self, number: int, file: SourceFile, before: int, record: int, offset: int
    ) -> Iterator[RawDocument]:
        if file.format == "text" and self._tail:
            yield from self._with_tail(number, file, record, offset)
            return
        for at, after, consumed, read in self._records(file, record, offset):
            # The next position, set before the document is yielded.
            self._next = {"file": number, "record": at + 1, "offset": after}
            self.read = before + consumed
            key, size, content = keyed(read())
            if size:
                yield RawDocument(number, at, key, read() if content is None else iter(content))
            else:
                self.empty += 1

    def _with_tail(self, number: int, file: SourceFile, record: int, offset: int) -> Iterator[RawDocument]:
        """A text file as two documents: one for training, and its end for validation."""
        if record == 0:
            _, size, _ = keyed(read_text(file.path))
            if not size:
                self.empty += 1
                return
            offset = _line_after(file.path, int(size * (1 - self._tail)))
        for at, split in ((0, "train"), (1, "validation")):
            if record > at:
                continue
            self._next = {"file": number, "record": at + 1, "offset": offset}
            self.read = file.size * at
            start, stop = (0, offset) if split == "train" else (offset, None)
            key, size, _ = keyed(_between(read_text(file.path), start, stop))
            if size:
                chunks = _between(read_text(file.path), start, stop)
                yield RawDocument(number, at, key, self._counted(chunks, file.size / size * (1 - at)), split)

    def _counted(self, chunks: Iterable[bytes], scale: float) -> Iterator[bytes]:
        """Yields the chunks and adds `scale` times their length to `read`."""
        total, before = 0, self.read
        for chunk in chunks:
            yield chunk
            total += len(chunk)
            self.read = before + int(scale * total)

    def _records(self, file: SourceFile, record: int, offset: int) -> Iterator[tuple[int, int, int, Callable]]:
        """Yields (record, offset of the next, bytes of the file consumed, function that reads the document)."""
        if file.format == "text":
            if record == 0:
                yield 0, 0, file.size, lambda: read_text(file.path)
            return
        reader = read_jsonl if file.format == "jsonl" else read_parquet
        for number, after, consumed, text in reader(file.path, file.name, self._column, record, offset):
            yield number, after, consumed, lambda text=text: iter((text,) if text else ())

    def _refuse_changed(self, file: SourceFile) -> None:
        recorded = self.digests.get(str(file.path.absolute()))
        if recorded and recorded[0] != file_state(file.path):
            raise InputError(f"{file.name} changed while it was read; prepare it again when no process writes to it")


def _between(chunks: Iterable[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    """The bytes from `start` to `stop` of a text."""
    at = 0
    for chunk in chunks:
        here = chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if here:
            yield here
        if stop is not None and at >= stop:
            return


def _line_after(path: Path, position: int) -> int:
    """Where a line begins after a position, or a word, or else a character."""
    near = b"".join(_between(read_text(path), position, position + _SEARCH_BYTES))
    for space in (b"\n", b" "):
        if (offset := near.find(space)) >= 0:
            return position + offset + (space == b"\n")
    while near and near[0] & 0xC0 == 0x80:
        near, position = near[1:], position + 1
    return position


def open_source(config: PrepareConfig) -> Source:
    """Opens the source that a configuration names.

    A single text file is divided into what is trained on and a stretch at its end.

    Raises:
        InputError: nothing is found under that name.
    """
    config.validate()
    if config.dataset.name:
        from tttlm.data.datasets_source import DatasetSource

        return DatasetSource(config.dataset, config.column)
    if config.source == ("stdlib",):
        files, skipped = _standard_library(config.max_file_bytes or 750_000), None
    else:
        files, skipped = find_files(config)
    if not files:
        raise InputError(f"no files to prepare under {', '.join(config.source)}")
    if not any(file.size for file in files):
        raise InputError(f"nothing to prepare: {_some(files)} {'is' if len(files) == 1 else 'are'} empty")
    alone = len(files) == 1 and 0 < config.held_out < 1
    return FileSource(files, config.column, skipped, config.held_out if alone else 0.0)


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


def sample_texts(source: Source, limit: int, held_out: Callable[[RawDocument], bool]) -> Iterator[str]:
    """Draws a sample of the training documents for training a tokenizer: the same text whenever it is drawn.

    Of files, some are taken in an order shuffled by name, and no file gives much more than its part; of a
    dataset, the first documents are taken.
    """
    if not isinstance(source, FileSource):
        yield from _clipped(source.documents(), limit, limit, held_out)
        return
    most = max(256 * 1024, 4 * limit // len(source.files))
    for file in sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest()):
        if limit <= 0:
            return
        alone = FileSource([file], source._column, tail=source._tail)
        for text in _clipped(alone.documents(), min(most, limit), limit, held_out):
            limit -= len(text)
            yield text


def _clipped(
    documents: Iterator[RawDocument], most: int, limit: int, held_out: Callable[[RawDocument], bool]
) -> Iterator[str]:
    left = min(most, limit)
    for document in documents:
        if held_out(document):
            continue
        for chunk in document.chunks:
            text = chunk[:left].decode("utf-8", "ignore")
            yield text
            left -= len(chunk)
            if left <= 0:
                return
