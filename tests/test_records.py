"""Small files: what was written is read back typed; anything else is one line with the file and the key."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from tttlm.errors import InputError
from tttlm.records import (
    MAX_LINE_BYTES,
    RecordError,
    from_plain,
    parse_json,
    read_lines,
    read_record,
    shown,
    write_json,
    write_sealed,
)


@dataclasses.dataclass(frozen=True)
class Size:
    bytes: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
    format: int
    kind: Literal["a", "b"]
    files: dict[str, Size]
    weights: tuple[float, ...] = ()
    pair: tuple[int, str] | None = None
    plain: bool = False
    more: Any = None


GOOD = Facts(1, "b", {"x": Size(3, "ff"), "\udce9": Size(0)}, (1.0, 2.5), (1, "y"), True, [{"k": None}])


def read(path: Path) -> Facts:
    return read_record(path, Facts, advice="make it again")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", GOOD)
    assert read(tmp_path / "f.json") == GOOD
    (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "f.json").read_bytes())
    assert read(tmp_path / "f.json") == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def changed(**values: Any) -> bytes:
    return json.dumps({**dataclasses.asdict(GOOD), **values}).encode()


SPOILT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "not UTF-8": (b'{"format": "\xe9"}', "not UTF-8 text .byte 12"),
    "UTF-16": ('{"format": 1}'.encode("utf-16"), "not UTF-8"),
    "no JSON": (b"{format: 1}", "is not JSON .line 1, column 2"),
    "cut short": (changed()[:40], "is not JSON"),
    "a list": (b"[1]", "an object .Facts. was expected, got .1."),
    "null": (b"null", "an object"),
    "key missing": (b'{"format": 1, "kind": "a"}', "key 'files' is missing"),
    "key unknown": (changed(formt=1), r"unknown key 'formt' \(did you mean 'format'\?\)"),
    "key twice": (b'{"format": 1, "format": 2}', "the key 'format' twice"),
    "text for a number": (changed(format="1"), "'format': an integer was expected, got '1'"),
    "truth for a number": (changed(format=True), "'format': an integer was expected, got True"),
    "number for truth": (changed(plain=1), "'plain': true or false was expected"),
    "part of a number": (changed(format=1.5), "'format': an integer"),
    "unknown choice": (changed(kind="c"), "'kind': one of 'a', 'b' was expected, got 'c'"),
    "below": (changed(files={"x": {"bytes": None}}), "'files.x.bytes': an integer was expected, got None"),
    "list for an object": (changed(files=[]), "'files': an object was expected"),
    "in a list": (changed(weights=[1, "2"]), r"'weights\[1\]': a number"),
    "too many": (changed(pair=[1, "x", 2]), "'pair': a list of 2"),
    "huge": (changed(format=10**30), "'format': an integer of at most 64 bits"),
    "digits": (b'{"format": ' + b"9" * 6_000 + b"}", "is not JSON that can be read"),
    "deep": (b"[" * 1_000_000, "nests too deeply"),
    "deep objects": (b'{"a":' * 1_000_000, "nests too deeply"),
    "long value": (changed(kind="x" * 10_000), r"x\.\.\."),
    "long key": (json.dumps({"x" * 10_000: 1}).encode(), r"x\.\.\."),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_right_is_one_line_with_file_key_and_what_to_do(tmp_path: Path, name: str) -> None:
    data, said = SPOILT[name]
    path = tmp_path / "facts.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; make it again")
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))


def test_what_is_no_small_file_is_one_line_in_bounded_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "long").write_bytes(b"[" + b" " * 1_000_000 + b"]")
    begin = time.monotonic()
    for path, said in (
        (tmp_path / "none", "is missing"),
        (tmp_path / "folder", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "long" / "below", "Not a directory|missing"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(InputError, match=said):
            read(path)
    os.symlink("/dev/zero", tmp_path / "zeros.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        next(read_lines(tmp_path / "zeros.jsonl", int))
    many = "{" + ", ".join(f'"{n}": 0' for n in range(100_000)) + ', "99999": 1}'
    with pytest.raises(RecordError, match="'99999' twice"):
        parse_json(many)
    with pytest.raises(InputError, match="longer than 1,000 bytes"):
        read_record(tmp_path / "long", Facts, advice="", max_bytes=1_000)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("old", [b'"a"', b"1.0", b'"ff"', b"null", b"true", b"0"])
def test_a_sealed_file_that_was_edited_is_refused_though_it_could_be_read(tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "facts.json"
    written = dataclasses.replace(GOOD, kind="a")
    write_sealed(path, written)
    sealed = lambda: read_record(path, Facts, advice="make it again", sealed=True)
    assert sealed() == written
    data = path.read_bytes()
    new = {b'"a"': b'"b"', b"1.0": b"1.5", b'"ff"': b'"fe"', b"null": b"3", b"true": b"false", b"0": b"2"}[old]
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(InputError, match=r"facts.json: was altered .*; make it again"):
        sealed()
    write_json(path, written)
    with pytest.raises(InputError, match="key 'digest' is missing"):
        sealed()


def test_a_file_of_another_version_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text('{"format": 7, "unknown": 1}')
    with pytest.raises(InputError, match="has format 7, this version reads 1; make it again"):
        read_record(path, Facts, advice="make it again", format=1, sealed=True)


def test_a_value_is_shown_on_one_short_line() -> None:
    itself: list[Any] = []
    itself.append(itself)
    for value in (itself, "x\n" * 10**6, list(range(10**6)), {"key": "y" * 10**6}, -(10**6000), [10**6000], "\x1b[31m"):
        text = shown(value)
        assert len(text) <= 80
        assert text.isprintable()
    assert shown(10**100) == "101 digits"
    assert shown("a name", quote=False) == "a name"


def test_a_number_may_be_written_without_a_point() -> None:
    assert from_plain(3, float) == 3.0
    assert isinstance(from_plain(3, float), float)
    with pytest.raises(RecordError):
        from_plain(10**400, float)


def test_a_bad_line_is_numbered_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    long = b'"' + b"x" * (3 * MAX_LINE_BYTES) + b'"'
    path.write_bytes(b'{"bytes": 1}\n{"bytes": \n\xff\n' + long + b'\n{"bytes": "1"}\n\n{"bytes": 2}\n{"byt')
    lines = list(read_lines(path, Size))
    assert [line.value for line in lines] == [Size(1), None, None, None, None, None, Size(2), None]
    assert [line.number for line in lines if line.problem] == [2, 3, 4, 5, 6, 8]
    assert "longer than" in lines[3].problem
    assert "'bytes': an integer" in lines[4].problem
    assert b"".join(line.data for line in lines if len(line.data) < MAX_LINE_BYTES) == path.read_bytes().replace(
        long + b"\n", b""
    )
