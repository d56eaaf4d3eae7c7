"""Reading text files, JSON lines and Parquet, compressed or not, in bounded memory."""

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tttlm.errors import InputError

CHUNK = 1 << 20

# (record number, offset of the next record, bytes of the file consumed, text as UTF-8 or None where there is none)
Record = tuple[int, int, int, bytes | None]


def read_text(path: Path) -> Iterator[bytes]:
    """The bytes of a file in chunks, unpacked where its name says that it is packed."""
    with _open(path) as stream:
        try:
            while chunk := stream.read(CHUNK):
                yield chunk
        except (EOFError, OSError, lzma.LZMAError, _zstd_error()) as error:
            raise _damaged(path, error) from error


def read_jsonl(path: Path, name: str, column: str, record: int, offset: int) -> Iterator[Record]:
    """The records of a JSON-lines file from `record` on, which begins at byte `offset` where it is not packed."""
    packed = path.suffix in _OPENERS
    skip = record if packed else 0
    with open(path, "rb") as raw, _unpacked(raw, path) as stream:
        if packed:
            number, offset = 0, 0  # a packed file has to be read from its beginning
        else:
            number = record
            stream.seek(offset)
        try:
            while line := stream.readline():
                offset += len(line)
                if skip:
                    skip -= 1
                elif line.strip():
                    consumed = raw.tell() if packed else offset
                    yield number, offset, consumed, _field(line, f"{name}, line {number + 1}", column)
                number += 1
        except (EOFError, lzma.LZMAError, _zstd_error(), OSError) as error:
            raise _damaged(path, error) from error


def _field(line: bytes, where: str, column: str) -> bytes | None:
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        hint = "; a JSON array is not JSON lines: write one object a line" if line.lstrip()[:1] == b"[" else ""
        raise InputError(f"{where}: not a line of JSON ({error}){hint}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object was expected, this is a {type(record).__name__}")
    return as_text(record, where, column)


def as_text(record: dict[str, Any], where: str, column: str) -> bytes | None:
    """The text of a record as bytes (invalid UTF-8 stays as it is); None where it is null."""
    if column not in record:
        raise InputError(
            f"{where}: no column {column!r}; there are: {', '.join(map(str, record))} (choose with --column)"
        )
    text = record[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")  # half a pair written as \\ud800: invalid, and counted as such


def read_parquet(path: Path, name: str, column: str, record: int, offset: int) -> Iterator[Record]:
    """The rows of a Parquet file from `record` on."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise InputError(f"{name}: no column {column!r}; there are: {', '.join(names)} (choose with --column)")
        kind = file.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(f"{name}: column {column!r} holds {kind}, not text")
        rows, number = max(file.metadata.num_rows, 1), 0
        for group in range(file.num_row_groups):
            in_group = file.metadata.row_group(group).num_rows
            if number + in_group <= record:
                number += in_group
                continue
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                    # As binary: what claims to be UTF-8 need not be.
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        if number >= record:
                            yield number, 0, size * (number + 1) // rows, value.as_py()
                        number += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise _damaged(path, error) from error


class _ZstdReader(io.RawIOBase):
    """Unpacks one Zstandard frame after another, and tells a file that ends in the middle of one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._raw, self._frame, self._out, self._begun = raw, self._new(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._begun and not self._frame.eof:
                    raise EOFError("it ends in the middle of a Zstandard frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._begun = True
            self._out = self._frame.decompress(data)
        size = min(len(buffer), len(self._out))
        buffer[:size], self._out = self._out[:size], self._out[size:]
        return size


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".zst": _ZstdReader,
}


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    opener = _OPENERS.get(path.suffix)
    return cast(BinaryIO, io.BufferedReader(opener(raw), CHUNK)) if opener else raw


def _open(path: Path) -> BinaryIO:
    return _unpacked(open(path, "rb"), path)


def _damaged(path: Path, error: Exception) -> InputError:
    said = str(error).strip().splitlines()
    return InputError(f"{path} cannot be read to its end ({said[0] if said else type(error).__name__}); fetch it again")
