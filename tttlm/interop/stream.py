"""Streams of the official JAX trainer: MessagePack records of a key and an array, read and written without unpickling.

A stream is a sequence of arrays `[key, bytes]`: the key is an array of strings, the bytes are one array in the format
of `flax.serialization.to_bytes`. That is an extension of type 1 with `[shape, dtype, values]`, or for an array of more
than 2**30 bytes a map with the key `__msgpack_chunked_array__`, the shape, and such extensions of the flattened values
one after another. Only the few bytes around the values are parsed: values are skipped, and read on demand.
"""

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np

from tttlm.errors import InputError
from tttlm.interop.tensors import Tensor, Written, unfinished, write_values

CHUNK_BYTES = 2**30  # flax.serialization.MAX_CHUNK_SIZE
_LARGEST = 2**32 - 1  # bytes of one object of MessagePack
_MOST_ITEMS, _LONGEST_TEXT, _DEEPEST = 4096, 4096, 4
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}
_CHUNKED = "__msgpack_chunked_array__"


class Span(NamedTuple):
    """Bytes that were skipped: where they begin, and how many they are."""

    offset: int
    size: int


class Extension(NamedTuple):
    """An extension of MessagePack: its type, and where its bytes are."""

    kind: int
    span: Span


class _Malformed(ValueError):
    """Raised for bytes that are not such a stream; the message continues after the name of the file."""


class _Cut(_Malformed):
    """Raised if the file is truncated."""


class _Reader:
    """Parses MessagePack from a part of a file; strings and numbers are read, binary data and extensions skipped."""

    def __init__(self, file: BinaryIO, span: Span) -> None:
        self._file, self.end = file, span.offset + span.size
        self._go_to(span.offset)

    def _go_to(self, offset: int) -> None:
        self._file.seek(offset)
        self.offset = offset

    def _take(self, size: int) -> bytes:
        if self.offset + size > self.end:
            raise _Cut
        data = self._file.read(size)
        if len(data) < size:
            raise _Cut
        self.offset += size
        return data

    def _skip(self, size: int) -> Span:
        span = Span(self.offset, size)
        if self.offset + size > self.end:
            raise _Cut
        self._go_to(self.offset + size)
        return span

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def value(self, depth: int = 0) -> Any:
        """The next object, with `Span` for binary data and `Extension` for extensions."""
        if depth > _DEEPEST:
            raise _Malformed("it nests too deeply")
        code = self._take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 256
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code & 0xE0 == 0xA0:
            return self._text(code & 0x1F)
        if code & 0xF0 == 0x90:
            return self._array(code & 0x0F, depth)
        if code & 0xF0 == 0x80:
            return self._map(code & 0x0F, depth)
        if 0xC4 <= code <= 0xC6:
            return self._skip(self._unsigned(1 << (code - 0xC4)))
        if 0xC7 <= code <= 0xC9:
            size = self._unsigned(1 << (code - 0xC7))
            return Extension(self._take(1)[0], self._skip(size))
        if 0xD4 <= code <= 0xD8:
            return Extension(self._take(1)[0], self._skip(1 << (code - 0xD4)))
        if 0xCC <= code <= 0xCF:
            return self._unsigned(1 << (code - 0xCC))
        if 0xD0 <= code <= 0xD3:
            return int.from_bytes(self._take(1 << (code - 0xD0)), "big", signed=True)
        if code in (0xCA, 0xCB):
            return struct.unpack(">f" if code == 0xCA else ">d", self._take(4 if code == 0xCA else 8))[0]
        if 0xD9 <= code <= 0xDB:
            return self._text(self._unsigned(1 << (code - 0xD9)))
        if code in (0xDC, 0xDD):
            return self._array(self._unsigned(2 if code == 0xDC else 4), depth)
        if code in (0xDE, 0xDF):
            return self._map(self._unsigned(2 if code == 0xDE else 4), depth)
        raise _Malformed("found a byte that begins no object of MessagePack")

    def _text(self, size: int) -> str:
        if size > _LONGEST_TEXT:
            raise _Malformed("found a string of absurd length")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise _Malformed("found a string that is not UTF-8") from None

    def _array(self, count: int, depth: int) -> list[Any]:
        if count > _MOST_ITEMS:
            raise _Malformed("found an array of absurd length")
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[Any, Any]:
        if count > _MOST_ITEMS:
            raise _Malformed("found a map of absurd length")
        keys_and_values = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(count)]
        try:
            return dict(keys_and_values)
        except TypeError:
            raise _Malformed("found a map whose keys are not strings") from None


def read_stream(path: Path) -> dict[tuple[str, ...], Tensor]:
    """The locations of the arrays of a stream, by key; no values are read.

    Raises:
        InputError: the file cannot be read, is truncated, or is not such a stream.
    """
    found: dict[tuple[str, ...], Tensor] = {}
    number, start, size = 0, 0, 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while start < size:
                number += 1
                reader = _Reader(file, Span(start, size - start))
                record = reader.value()
                start, end = start, reader.offset
                key, data = record if isinstance(record, list) and len(record) == 2 else (None, None)
                if not isinstance(key, list) or not all(isinstance(part, str) for part in key) or not key:
                    raise _Malformed("expected a record of a key and an array")
                if not isinstance(data, Span):
                    raise _Malformed(f"the record {'/'.join(key)!r} holds no bytes")
                if tuple(key) in found:
                    raise _Malformed(f"the key {'/'.join(key)!r} is there twice")
                found[tuple(key)] = _array(path, file, data, "/".join(key))
                start = end
    except _Cut:
        raise InputError(
            f"{path}: cut off within record {number}, which begins at byte {start:,} of {size:,}; fetch it again"
        ) from None
    except _Malformed as error:
        raise InputError(
            f"{path}: is damaged or no stream of the official JAX trainer: {error} (record {number}, byte {start:,}); "
            "fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None
    if not found:
        raise InputError(f"{path}: is empty; fetch it again")
    return found


def _array(path: Path, file: BinaryIO, span: Span, name: str) -> Tensor:
    """The array in the bytes of one record."""
    try:
        reader = _Reader(file, span)
        value = reader.value()
        if reader.offset != reader.end:
            raise _Malformed(f"more than one object is in the record {name!r}")
        if isinstance(value, (bool, int, float)):  # a number of Python, as `step` may be
            return Tensor(path, (), type(value).__name__, ())
        if isinstance(value, dict) and value.get(_CHUNKED) is True:
            shape = _in_order(value.get("shape"))
            parts = [_extension(file, part, name) for part in _in_order(value.get("chunks"))]
            dtypes = {dtype for _, dtype, _ in parts}
            if len(dtypes) != 1 or not _is_shape(shape):
                raise _Malformed(f"the chunks of {name!r} do not fit together")
            (dtype,), pieces = dtypes, tuple(piece for _, _, piece in parts)
        else:
            shape, dtype, piece = _extension(file, value, name)
            pieces = (piece,)
    except _Cut:
        raise _Malformed(f"the array {name!r} is longer than its record") from None
    if sum(size for _, size in pieces) != math.prod(shape) * jnp.dtype(dtype).itemsize:
        raise _Malformed(f"the array {name!r} has another size than {list(shape)} of {dtype}")
    return Tensor(path, tuple(shape), dtype, pieces)


def _extension(file: BinaryIO, value: Any, name: str) -> tuple[list[int], str, Span]:
    """Shape, dtype and values of an array as flax writes it."""
    if not isinstance(value, Extension) or value.kind not in (1, 3):  # an array, a scalar of numpy
        raise _Malformed(f"{name!r} is no array as flax writes it")
    reader = _Reader(file, value.span)
    parts = reader.value()
    if reader.offset != reader.end or not isinstance(parts, list) or len(parts) != 3:
        raise _Malformed(f"{name!r} is no array as flax writes it")
    shape, dtype, data = parts
    if not _is_shape(shape) or dtype not in _DTYPES or not isinstance(data, Span):
        raise _Malformed(f"the array {name!r} has no shape, no values or an unknown dtype")
    return shape, dtype, data


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def _in_order(items: Any) -> list[Any]:
    """The values of a map with the keys "0", "1", ..., which is how flax writes a tuple."""
    if not isinstance(items, dict) or any(str(i) not in items for i in range(len(items))):
        raise _Malformed("found a map that is not a tuple of flax")
    return [items[str(i)] for i in range(len(items))]


class Record(NamedTuple):
    """A key and the array that is to be written under it."""

    key: tuple[str, ...]
    array: Written


def write_stream(path: Path, records: Iterable[Record], *, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Writes a stream array by array; it appears under its name when it is complete.

    Args:
        path: the file.
        records: keys and arrays; the values of each are computed when it is written.
        chunk_bytes: larger arrays are written in chunks, as in flax.

    Raises:
        InputError: an array is too large for the format.
    """
    with unfinished(path) as file:
        for key, array in records:
            if array.nbytes > _LARGEST - 2**20:
                raise InputError(f"array {'/'.join(key)!r} of {array.nbytes:,} bytes is too large for a stream")
            value = array.made()
            if array.nbytes <= chunk_bytes:
                heads = [_array_head(array.shape, array.dtype, array.nbytes)]
                pieces, begin, between = [value], b"", [b""]
            else:
                count = max(1, chunk_bytes // array.dtype.itemsize)
                flat = value.reshape(-1)
                pieces = [flat[i : i + count] for i in range(0, flat.size, count)]
                heads = [_array_head(piece.shape, array.dtype, piece.nbytes) for piece in pieces]
                shape = {str(i): n for i, n in enumerate(array.shape)}
                begin = b"\x83" + b"".join(map(msgpack.packb, (_CHUNKED, True, "shape", shape, "chunks")))
                begin += msgpack.Packer().pack_map_header(len(pieces))
                between = [msgpack.packb(str(i)) for i in range(len(pieces))]
            size = len(begin) + sum(map(len, heads)) + sum(map(len, between)) + array.nbytes
            file.write(b"\x92" + msgpack.packb(key) + _binary_head(size) + begin)
            for label, head, piece in zip(between, heads, pieces, strict=True):
                file.write(label + head)
                write_values(file, piece)


def _array_head(shape: tuple[int, ...], dtype: np.dtype, nbytes: int) -> bytes:
    """The bytes that flax writes of an array before its values."""
    inside = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name) + _binary_head(nbytes)
    size = len(inside) + nbytes
    fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}
    head = fixed.get(size) or _sized(size, b"\xc7\xc8\xc9")
    return head + b"\x01" + inside


def _binary_head(size: int) -> bytes:
    return _sized(size, b"\xc4\xc5\xc6")


def _sized(size: int, codes: bytes) -> bytes:
    """A code and a size, in as few bytes as the size needs."""
    width = 0 if size < 1 << 8 else 1 if size < 1 << 16 else 2
    return codes[width : width + 1] + size.to_bytes(1 << width, "big")
