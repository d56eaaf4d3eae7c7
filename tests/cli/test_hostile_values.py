"""Every field of every configuration against values that nobody means: refused in one line, or taken for what they are.

The table is made from the dataclasses, so a new field is in it.
"""

import ast
import importlib
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tttlm
from tttlm.errors import InputError
from tttlm.fields import field_kinds, is_section, read_fields, with_fields
from tttlm.ranges import Range
from tttlm.training.config import TrainConfig, check

ROOT = Path(tttlm.__file__).parent


def configurations() -> list[type]:
    """All configurations there are, but for those that are sections or bases of others."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Arguments")):
                module = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
                found.append(getattr(importlib.import_module(module), node.name))
    inside = {kind for cls in found for _, kind in field_kinds(cls) if is_section(kind)}
    return [cls for cls in found if cls not in inside and not any(cls in other.__mro__[1:] for other in found)]


COMMANDS = configurations()
HOSTILE: tuple[Any, ...] = (
    *(0, -1, -0.5, 1.5, 10**9, 10**30, 10**5000, 1e39, 1e-320, True),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "text", "a\0b", "~no-such-user/x", "\n", "9" * 5000),
    *([], [[]], [None], [float("nan")], {}, {"a": {}}, {"": -1}, {"a": float("nan")}, None),
)
FIELDS = [
    pytest.param(cls, name, kind, id=f"{cls.__name__}.{name}")
    for cls in COMMANDS
    for name, kind in field_kinds(cls)
    if not is_section(kind)
]


def numbers(kind: Any, rule: Any = None) -> Iterator[tuple[type, Any]]:
    """The types of numbers within a type, each with its range."""
    if kind in (int, float):
        yield kind, rule
    if typing.get_origin(kind) is typing.Annotated:
        inner, *rules = typing.get_args(kind)
        yield from numbers(inner, next((rule for rule in rules if isinstance(rule, Range)), rule))
    elif typing.get_origin(kind) is not typing.Literal:
        for inside in typing.get_args(kind):
            yield from numbers(inside)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize(("cls", "name", "kind"), FIELDS)
def test_a_hostile_value_is_refused_in_one_line_or_in_its_range(cls, name, kind):
    assert all(rule is not None for _, rule in numbers(kind)), f"{name} takes any number: give it a Range"
    ranges = dict(numbers(kind))
    for value in HOSTILE:
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        read, refusal = outcome(lambda nested=nested: read_fields(cls, nested, "x.yaml"))
        if refusal:
            assert refusal.startswith("x.yaml: ")
            assert name in refusal
            continue
        for leaf in leaves(list(read.values())):
            if type(leaf) in (int, float):
                assert type(leaf) in ranges, (value, leaf)
                assert math.isfinite(leaf) or any(rule.infinite for _, rule in numbers(kind))
                assert leaf == leaf
        made, _ = outcome(lambda read=read: with_fields(cls(), read))
        if cls is TrainConfig and made is not None:
            outcome(lambda made=made, read=read: check(with_fields(made, {"data.path": "data", **read})))


def outcome(action: Callable[[], Any]) -> tuple[Any, str]:
    """What comes of an action: a value, or the one line in which it refused."""
    try:
        return action(), ""
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 300
    return None, line


def test_no_configuration_is_left_out():
    names = {cls.__name__ for cls in COMMANDS}
    assert names >= {"TrainConfig", "CompareConfig", "EvalConfig", "PlotConfig", "PrepareArguments", "InspectArguments"}
    assert "ModelConfig" not in names  # a section, and in the table as one
    assert len(FIELDS) > 120
