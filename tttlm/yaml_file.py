"""Reads a YAML file as plain values, by the core schema of YAML 1.2, in bounded time and memory for any content.

So `on`, `off`, `yes` and dates are text, `1e-4` is a number, a duplicate key is refused with its line, and an anchor
may be used again as long as the total number of values is small.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from tttlm.errors import InputError
from tttlm.records import shown

MOST_BYTES = 2**17  # largest file: the configuration of a run has four thousand
MOST_VALUES = 50_000  # with every use of an anchor counted
DEEPEST = 40
MOST_DIGITS = 40

_SCALARS: dict[str, tuple[str, str, Any]] = {  # the core schema: tag, pattern, first letters, constructor
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", lambda text: _whole_number(text)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
    "str": (r"(?!)", "", str),
}


class _Loader(yaml.SafeLoader):
    """The parser of PyYAML with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (as PyYAML declares it)


for _name, (_pattern, _first, _) in _SCALARS.items():
    _first_letters = [*_first, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"({_pattern})\\Z"), _first_letters)


def read_yaml(path: str | Path) -> Any:
    """The values of a YAML file: dicts with text as keys, lists, text, numbers, booleans and None.

    Raises:
        InputError: the file cannot be read, is larger than 128 kB, is not UTF-8 or not YAML, has a duplicate key, nests
            deeper than 40 levels, or has more than 50,000 values.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{shown(str(path))} is not a file name") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} is larger than {MOST_BYTES // 1024} kB, so it is not a configuration")
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: it is not UTF-8 text") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_yaml(text: str) -> Any:
    """The values in YAML text; see `read_yaml`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Values().of(node, 0)
    except RecursionError:
        raise InputError(f"nests deeper than {DEEPEST} levels") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"not valid YAML{where}: {shown(' '.join(str(problem).split()), quote=False)}") from None


class _Values:
    """Turns nodes into values, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, node: yaml.Node, depth: int) -> Any:
        where = f"line {node.start_mark.line + 1}"
        self._count += 1
        if self._count > MOST_VALUES:
            raise InputError(f"{where}: has more than {MOST_VALUES:,} values, with every use of an anchor counted")
        if depth > DEEPEST:
            raise InputError(f"{where}: nests deeper than {DEEPEST} levels")
        name = node.tag.rpartition(":")[2]
        if isinstance(node, yaml.SequenceNode) and name == "seq":
            return [self.of(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and name == "map":
            result: dict[str, Any] = {}
            for key_node, value in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key, str):
                    raise InputError(f"line {line}: a key must be a word, got a {key_node.id}")
                if key in result:
                    raise InputError(f"line {line}: the key '{shown(key, quote=False)}' is a duplicate")
                result[key] = self.of(value, depth + 1)
            return result
        if isinstance(node, yaml.ScalarNode) and name in _SCALARS:
            pattern, _, value_of = _SCALARS[name]
            if name == "str" or re.fullmatch(pattern, node.value):
                try:
                    return value_of(node.value)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
        raise InputError(
            f"{where}: cannot be read as {shown(node.tag, quote=False)}: write text, a number, true or false"
        )


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise InputError(f"a number of {len(text):,} digits")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
