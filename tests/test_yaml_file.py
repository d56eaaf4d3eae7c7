"""YAML is read by the rules of version 1.2, and no file takes more than bounded time and memory."""

import time
from pathlib import Path

import pytest

from tttlm.errors import InputError
from tttlm.yaml_file import parse_yaml, read_yaml


def test_scalars_are_those_of_yaml_1_2():
    text = "[on, off, yes, 2001-01-01, 12:30:00, 1_000, =, 010, 0o17, 0x1F, 1e-4, .5, 1., -.inf, True, ~, Null, '1']"
    assert parse_yaml(text) == [
        *("on", "off", "yes", "2001-01-01", "12:30:00", "1_000", "=", 10, 15, 31, 1e-4, 0.5, 1.0, float("-inf"), True),
        *(None, None, "1"),
    ]
    assert parse_yaml("a:\non: 1\n1: 2\nnull: 3\n<<: 4") == {"a": None, "on": 1, "1": 2, "null": 3, "<<": 4}
    assert parse_yaml("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}
    assert parse_yaml("# nothing") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\n'a': 3", "line 3: the key 'a' is a duplicate"),
        ("m:\n  a: 1\n  a: 1", "line 3: the key 'a' is a duplicate"),
        ("[a]: 1", "line 1: a key must be a word, got a sequence"),
        ("a: &x [*x]", "nests deeper than 40 levels"),
        ("a: &x\n  b: *x", "nests deeper than 40 levels"),
        (
            "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 36)),
            "more than 50,000",
        ),
        ("a: " + "[" * 600, "nests deeper than 40 levels"),
        ("- " * 3000, "nests deeper than 40 levels"),
        ("a: " + "9" * 6000, "line 1: a number of 6,000 digits"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "cannot be read as tag:yaml.org,2002:python/object/apply:os",
        ),
        ("a: !!timestamp 2001-01-01", "cannot be read as tag:yaml.org,2002:timestamp"),
        ("a: !!int x", "cannot be read as tag:yaml.org,2002:int"),
        ("a: *b", "not valid YAML at line 1, column 4: found undefined alias 'b'"),
        ("a: *" + "b" * 9000, "found undefined alias 'bbb"),
        ("a: \x07", "not valid YAML: special characters are not allowed"),
        ("--- 1\n--- 2", "not valid YAML at line 2, column 1"),
    ],
)
def test_what_cannot_be_meant_is_one_short_line(text, says):
    begun = time.perf_counter()
    with pytest.raises(InputError) as caught:
        parse_yaml(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/dev/zero", "is larger than 128 kB"),
        ("no.yaml", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "is not a file name"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_what_is_no_configuration_is_not_read_to_its_end(path, says):
    with pytest.raises(InputError, match=says):
        read_yaml(path)


def test_a_file_of_another_encoding_is_refused_and_a_byte_order_mark_passed_over(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("a: 1", encoding="utf-8-sig")
    assert read_yaml(file) == {"a": 1}
    file.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        read_yaml(file)
