"""Reading text files, JSON lines and Parquet, compressed or not, in bounded memory.

The compression of a file is detected from its first bytes, not its name. Files that are not text are refused by name.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tttlm.errors import InputError

CHUNK = 1 << 20
MAX_RECORD_BYTES = 1 << 27  # length of a line of JSON
# A file that decompresses to more bytes than this, and to more than this many times its own size, is refused.
MAX_UNPACKED_BYTES, MAX_RATIO = 1 << 26, 500

# (record number, offset of the next record, bytes of the file consumed, text as UTF-8 or None if it has no text)
Record = tuple[int, int, int, bytes | None]

_BOM = b"\xef\xbb\xbf"
_HEAD = 4_096  # first bytes of a file, by which its format is detected
_FAULTS = (EOFError, OSError, lzma.LZMAError, ValueError)  # what the readers of archives raise


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


_PACKINGS: dict[str, tuple[tuple[bytes, ...], tuple[str, ...], Callable[[BinaryIO], Any]]] = {
    "gzip": ((b"\x1f\x8b",), (".gz", ".gzip"), lambda raw: gzip.GzipFile(fileobj=raw)),
    "xz": ((b"\xfd7zXZ\0",), (".xz",), lambda raw: _Streams(lzma.LZMADecompressor, raw)),
    "bzip2": ((b"BZh",), (".bz2",), lambda raw: _Streams(bz2.BZ2Decompressor, raw)),
    "Zstandard": (
        (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
        (".zst", ".zstd"),
        _zstd,
    ),
}
PACKED = frozenset(suffix for _, suffixes, _ in _PACKINGS.values() for suffix in suffixes)

_NO_TEXT = {  # first bytes of files that are not text
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "an LZ4 archive",
    b"\x1f\x9d": "a .Z archive",
    b"LZIP": "an lzip archive",
    b"\xff\x06\0\0sNaPpY": "a Snappy archive",
    b"PAR1": "a Parquet file (--format parquet reads it)",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF",
    b"{\\rtf": "a rich-text file",
    b"\x89PNG\r\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"\x7fELF": "a program",
    b"\xff\xfe": "UTF-16 or UTF-32 text, not UTF-8",
    b"\xfe\xff": "UTF-16 text, not UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text, not UTF-8",
}


def read_text(path: Path) -> Iterator[bytes]:
    """Reads the bytes of a text file in chunks, decompressed, without a byte order mark.

    Raises:
        InputError: the file cannot be read, is damaged, is not text, or is a decompression bomb.
    """
    with opened(path) as (_, stream, _):
        chunk = stream.read(CHUNK).removeprefix(_BOM)
        while chunk:
            yield chunk
            chunk = stream.read(CHUNK)


def read_jsonl(path: Path, name: str, column: str, record: int, offset: int) -> Iterator[Record]:
    """Reads the records of a JSON-lines file from `record` on, at byte `offset` if the file is not compressed."""
    with opened(path) as (raw, stream, packed):
        skip = record if packed else 0  # a compressed file has to be read from its start
        number, offset = (0, 0) if packed else (record, offset)
        if offset:
            stream.seek(offset)
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise InputError(f"{name}, line {number + 1}: is longer than {MAX_RECORD_BYTES:,} bytes; split it")
            offset += len(line)
            if number == 0:
                line = line.removeprefix(_BOM)
            if skip:
                skip -= 1
            elif line.strip():
                consumed = raw.tell() if packed else offset
                yield number, offset, consumed, _field(line, f"{name}, line {number + 1}", column)
            number += 1


def _field(line: bytes, where: str, column: str) -> bytes | None:
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=lambda p: _object(p, column))
    except RecursionError:
        raise InputError(f"{where}: not a line of JSON that can be read (it nests too deeply)") from None
    except ValueError as error:
        hint = "; a JSON array is not JSON lines: write one object a line" if line.lstrip()[:1] == b"[" else ""
        raise InputError(f"{where}: not a line of JSON ({str(error)[:200]}){hint}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object was expected, this is a {type(record).__name__}")
    return as_text(record, where, column)


def _object(pairs: list[tuple[str, Any]], column: str) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs) and sum(key == column for key, _ in pairs) > 1:
        raise ValueError(f"it has the key {column!r} twice")
    return record


def as_text(record: dict[str, Any], where: str, column: str) -> bytes | None:
    """The text of a record as bytes (invalid UTF-8 is kept); None if it is null."""
    if column not in record:
        there = ", ".join(map(str, record))[:200]
        raise InputError(f"{where}: no column {column!r}; there are: {there} (choose with --column)")
    text = record[column]
    if text is None:
        return None
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise InputError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")  # a lone surrogate (\\ud800) is counted as invalid UTF-8


def read_parquet(path: Path, name: str, column: str, record: int, offset: int) -> Iterator[Record]:
    """Reads the rows of a Parquet file from `record` on; every text type of Arrow is read."""
    import pyarrow
    import pyarrow.parquet

    faults = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)
    try:
        size = path.stat().st_size
        file = pyarrow.parquet.ParquetFile(path)
    except faults as error:
        raise _damaged(path, error) from error
    with file:
        schema = file.schema_arrow
        if schema.names.count(column) != 1:
            there = ", ".join(schema.names)[:200]
            what = "two columns" if column in schema.names else "no column"
            raise InputError(f"{name}: {what} {column!r}; there are: {there} (choose with --column)")
        kind = schema.field(column).type
        if not _holds_text(kind):
            raise InputError(f"{name}: column {column!r} holds {kind}, not text")
        rows, number, total = max(file.metadata.num_rows, 1), 0, 0
        for group in range(file.num_row_groups):
            in_group = file.metadata.row_group(group).num_rows
            if number + in_group <= record:
                number += in_group
                continue
            try:
                for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=[column]):
                    for value in _as_bytes(batch.column(0)):
                        if number >= record:
                            text = value.as_py()
                            total += len(text or b"")
                            _refuse_endless(path, total, size)
                            yield number, 0, size * (number + 1) // rows, text
                        number += 1
            except faults as error:
                if isinstance(error, InputError):
                    raise
                raise _damaged(path, error) from error


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if hasattr(kind, "storage_type"):  # an extension
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return types.is_null(kind) or any(getattr(types, f"is_{name}")(kind) for name in names)


def _as_bytes(column: Any) -> Any:
    """The values as binary, because strings of Arrow may have invalid UTF-8."""
    import pyarrow

    column = getattr(column, "storage", column)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO, bool]]:
    """Opens a text file, and decompresses it if it is compressed.

    Yields: (the file, its text, whether it is compressed).

    Raises:
        InputError: the file cannot be read, is damaged, is not text, or is a decompression bomb; also while the text is
            read.
    """
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb"))
            start = raw.read(8)
            raw.seek(0)
            packing = next((name for name, (magic, _, _) in _PACKINGS.items() if start.startswith(magic)), "")
            named = next((name for name, (_, suffixes, _) in _PACKINGS.items() if path.suffix.lower() in suffixes), "")
            if start and named and not packing:
                raise ValueError(f"it is not {named} data")
            stream: BinaryIO = raw
            if packing:
                unpacking = _Unpacking(_PACKINGS[packing][2](raw), raw, path)
                stream = cast(BinaryIO, stack.enter_context(io.BufferedReader(unpacking, CHUNK)))
            _refuse_no_text(path, cast(io.BufferedReader, stream).peek(_HEAD)[:_HEAD])
            yield raw, stream, bool(packing)
        except InputError:
            raise
        except _FAULTS as error:
            raise _damaged(path, error) from error


def _refuse_no_text(path: Path, head: bytes) -> None:
    what = next((what for start, what in _NO_TEXT.items() if head.startswith(start)), "")
    if not what and any(head.startswith(magic) for magic, _, _ in _PACKINGS.values()):
        what = "packed twice"
    if not what and head[257:262] == b"ustar":
        what = "a tar archive"
    if not what and b"\0" in head:
        what = "not text: it has bytes of value 0"
    if what:
        raise InputError(f"{path} is {what}; name only files of UTF-8 text, for instance 'folder/**/*.txt'")


class _Streams:
    """The content of an archive of one or several streams; Python's own readers drop what follows a damaged start."""

    def __init__(self, new: Callable[[], Any], raw: BinaryIO) -> None:
        self._new, self._raw, self._stream = new, raw, new()

    def read(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")  # streams may be padded
                while not packed and (more := self._raw.read(CHUNK)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return b""
                self._stream = self._new()
            elif self._stream.needs_input:
                packed = self._raw.read(CHUNK)
                if not packed:
                    raise EOFError("compressed data ended before its end marker")
            else:
                packed = b""
            if data := self._stream.decompress(packed, size):
                return data


class _Unpacking(io.RawIOBase):
    """The decompressed content of an archive; refuses a decompression bomb."""

    def __init__(self, source: Any, raw: BinaryIO, path: Path) -> None:
        self._source, self._raw, self._path, self._total = source, raw, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._total += len(data)
        _refuse_endless(self._path, self._total, self._raw.tell())
        return len(data)


def _refuse_endless(path: Path, unpacked: int, size: int) -> None:
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * size):
        raise InputError(f"{path} unpacks to more than {MAX_RATIO} times its size, so it is not text; leave it out")


def _damaged(path: Path, error: BaseException) -> InputError:
    if isinstance(error, OSError) and error.errno and error.strerror:
        return InputError(f"{path} cannot be read: {error.strerror}")
    lines = str(error).strip().splitlines()
    return InputError(
        f"{path} cannot be read to its end ({lines[0] if lines else type(error).__name__}); fetch it again"
    )
