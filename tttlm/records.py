"""Typed records in small JSON files that one program writes and a later one reads.

A file that was truncated, edited or written by another version is refused in one line that names the file, the key
and what to do.
"""

import dataclasses
import difflib
import errno
import hashlib
import json
import math
import os
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from tttlm.errors import InputError
from tttlm.ranges import Rule

T = TypeVar("T")

MAX_BYTES = 64 << 20  # largest file; a manifest of a thousand shards is 1 MB
MAX_LINE_BYTES = 1 << 20  # longest line in a file of JSON lines
_DIGEST = "digest"  # the key of the digest in a sealed file
_SHOWN = 60  # characters of a wrong key that a message shows
_REPR = reprlib.Repr()  # of a few items of a list, however long or nested it is
_REPR.maxstring = _REPR.maxother = 100


class RecordError(ValueError):
    """Raised if a text or a plain value does not have the expected type; the message names the key and the value."""


def read_record(
    path: str | Path,
    kind: type[T],
    *,
    advice: str,
    parse: Callable[[str], Any] | None = None,
    max_bytes: int = MAX_BYTES,
    format: int | None = None,
    sealed: bool = False,
) -> T:
    """Reads a small file as a typed value.

        facts = read_record(folder / "facts.json", Facts, advice="copy it again")

    Args:
        path: the file, UTF-8 text.
        kind: a dataclass, or another type that `from_plain` accepts.
        advice: what to do about a file that cannot be used; the end of the message.
        parse: a function from text to plain values, by default `parse_json`; it may raise ValueError.
        max_bytes: a longer file is refused without reading more of it.
        format: the required value of the key `format`; checked first, so that a file of another version is reported as
            that.
        sealed: whether the file was written by `write_sealed` and must be unchanged.

    Raises:
        InputError: the file is missing, cannot be read, or does not have such a value.
    """
    text = read_text(path, advice=advice, max_bytes=max_bytes)
    try:
        value = (parse or parse_json)(text)
        if format is not None and isinstance(value, dict) and value.get("format", 0) != format:
            raise RecordError(f"has format {shown(value.get('format', 0))}, this version reads {format}")
        if sealed and isinstance(value, dict):
            if _DIGEST not in value:
                raise RecordError(f"key '{_DIGEST}' is missing")
            if value.pop(_DIGEST) != _digest(value):
                raise RecordError("was altered (its digest is not that of its content)")
        return from_plain(value, kind)
    except RecordError as error:
        raise InputError(f"{path}: {error}; {advice}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({_first_line(error)}); {advice}") from None


def read_text(path: str | Path, *, advice: str, max_bytes: int = MAX_BYTES) -> str:
    """Reads a small UTF-8 file, without a byte order mark.

    Raises:
        InputError: the file is missing, is not a regular file, is longer than `max_bytes`, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file; {advice}")
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_first_line(error)}); {advice}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: is longer than {max_bytes:,} bytes; {advice}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start:,}); {advice}") from None


def parse_json(text: str) -> Any:
    """Parses JSON; a duplicate key in an object is an error.

    Raises:
        RecordError: the text is not JSON; the message says where.
    """
    if not text.strip():
        raise RecordError("is empty")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise RecordError("is not JSON that can be read (it nests too deeply)") from None
    except RecordError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise RecordError(f"is not JSON that can be read ({_first_line(error)})") from None


def from_plain(value: Any, kind: Any, key: str = "") -> Any:
    """Builds a typed value from the values of JSON or YAML: objects, lists, strings, numbers, booleans and null.

    Args:
        value: the plain value.
        kind: a dataclass, `dict[str, X]`, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`, `X | None`, a `Literal`, `str`,
            `bool`, `int` (64 bits), `float` (also from an integer) or `Any`; any of them within `Annotated`, with the
            rules of `tttlm.ranges`. A dataclass is built from an object with its fields as keys; fields with a default
            may be missing, and other keys are refused.
        key: the position of the value, for messages, such as `parts[0].files`.

    Raises:
        RecordError: the value has another type; names the key.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, typing.cast(type, kind), key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value = from_plain(value, arguments[0], key)
        for rule in arguments[1:]:
            if isinstance(rule, Rule):
                try:
                    value = rule.read(value)
                except ValueError as error:
                    raise RecordError(f"{f'{key!r} ' if key else ''}must be {error}, got {shown(value)}") from None
        return value
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _mismatch(key, "one of " + ", ".join(map(repr, arguments)), value)
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(value, arguments, key)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _mismatch(key, "an object", value)
        return {
            from_plain(name, arguments[0], key): from_plain(item, arguments[1], _below(key, name))
            for name, item in value.items()
        }
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, key)
    return _scalar(value, kind, key)


def write_json(path: Path, value: Any) -> None:
    """Writes a value (a dataclass or a JSON value) atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(path, (json.dumps(_plain(value), indent=1, sort_keys=True) + "\n").encode())


def write_sealed(path: Path, value: Any) -> str:
    """Writes a dataclass with the sha256 of its content under the key `digest`, which `read_record` checks.

    Returns:
        The digest.

    Raises:
        OSError: the file cannot be written.
    """
    plain = json.loads(json.dumps(_plain(value)))
    assert _DIGEST not in plain, f"{type(value).__name__} has a field of that name"
    digest = _digest(plain)
    write_json(path, {**plain, _DIGEST: digest})
    return digest


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically, also under a loss of power.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclasses.dataclass(frozen=True)
class Line(Generic[T]):
    """One line of a file of JSON lines.

    Attributes:
        number: the line's number, from 1.
        data: its bytes in the file (at most `MAX_LINE_BYTES`), including the newline.
        value: its value; None if it cannot be read.
        problem: why it cannot be read; "" if it can.
    """

    number: int
    data: bytes
    value: T | None
    problem: str


def read_lines(path: str | Path, kind: type[T]) -> Iterator[Line[T]]:
    """Yields the lines of a file of JSON lines as typed values; a line that cannot be read has a `problem`.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    with open(path, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        number = 0
        while data := stream.readline(MAX_LINE_BYTES):
            number += 1
            if not data.endswith(b"\n") and len(data) == MAX_LINE_BYTES:
                while (more := stream.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield Line(number, data, None, f"is longer than {MAX_LINE_BYTES:,} bytes")
                continue
            try:
                yield Line(number, data, from_plain(parse_json(data.decode()), kind), "")
            except UnicodeDecodeError:
                yield Line(number, data, None, "is not UTF-8 text")
            except RecordError as error:
                yield Line(number, data, None, str(error))


def _dataclass(value: Any, kind: type, key: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(key, f"an object ({kind.__name__})", value)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in value:
        if name not in fields:
            close = difflib.get_close_matches(str(name)[:_SHOWN], fields, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise RecordError(f"unknown key '{_below(key, str(name))}'{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise RecordError(f"key '{_below(key, name)}' is missing")
    hints = _hints(kind)
    return kind(**{name: from_plain(item, hints[name], _below(key, name)) for name, item in value.items()})


def _union(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return from_plain(value, kind, key)
            except RecordError as error:
                problems.append(error)
    raise problems[0] if len(problems) == 1 else _mismatch(key, " or ".join(map(_name, kinds)), value)


def _sequence(value: Any, origin: type, arguments: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(key, "a list", value)
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        if len(value) != len(arguments):
            raise _mismatch(key, f"a list of {len(arguments)}", value)
        kinds = arguments
    else:
        kinds = (arguments[0],) * len(value)
    items = enumerate(zip(value, kinds, strict=True))
    return origin(from_plain(item, kind, f"{key}[{i}]") for i, (item, kind) in items)


def _scalar(value: Any, kind: Any, key: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and whole and abs(value) < 1 << 1023:
        return float(value)
    if kind is int and whole and not -(1 << 63) <= value < 1 << 64:
        raise RecordError(f"{_at(key)}an integer of at most 64 bits was expected, got one of {_digits(value)} digits")
    if kind is bool or kind is int:
        right = isinstance(value, bool) if kind is bool else whole
    else:
        right = isinstance(value, kind)
    if not right:
        raise _mismatch(key, _name(kind), value)
    return value


def _mismatch(key: str, wanted: str, value: Any) -> RecordError:
    return RecordError(f"{_at(key)}{wanted} was expected, got {shown(value)}")


def shown(value: Any, *, quote: bool = True) -> str:
    """A value as it is shown in errors: on one line, and truncated if it is long."""
    if isinstance(value, int) and _digits(value) > _SHOWN:
        return f"{_digits(value)} digits"
    try:
        text = _REPR.repr(value) if quote or not isinstance(value, str) else value
    except ValueError:  # a list has an integer with too many digits for Python
        text = f"a {type(value).__name__} too large to be shown"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:100])
    return text if len(text) <= 80 else f"{text[:60]}..."


def _at(key: str) -> str:
    return f"'{key}': " if key else ""


def _digits(value: int) -> int:
    return max(1, math.ceil(abs(value).bit_length() * math.log10(2)))


def _name(kind: Any) -> str:
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _below(key: str, name: str) -> str:
    name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return f"{key}.{name}" if key else name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RecordError(f"has the key {twice[:_SHOWN]!r} twice in one object")
    return found


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)
