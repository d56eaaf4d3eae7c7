"""Ranges stand in the types of fields, and every reader of values asks them there."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from tttlm.errors import InputError
from tttlm.fields import check_fields, from_values, read_again, read_fields, with_fields
from tttlm.ranges import Count, CountOrZero, FilePath, NonNegativeFloat, OutputPath, PositiveFloat, Range


@dataclass(frozen=True)
class Inner:
    size: Count = 3
    scale: PositiveFloat = 1.0
    names: tuple[str, ...] = ("a",)
    limits: tuple[NonNegativeFloat, Annotated[float, Range(above=0, infinite=True)]] = (0.0, float("inf"))


@dataclass(frozen=True)
class Outer:
    run: OutputPath = "run"
    source: FilePath = ""
    weights: dict[FilePath, PositiveFloat] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(size=7))
    warmup: CountOrZero | None = None
    axis: Annotated[int, Range(least=1, also=(-1,))] = 1


def test_values_of_a_file_become_the_types_of_the_fields(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    values = {"run": "~/x", "weights": {"~/a": 1, "b": 2.5}, "inner": {"scale": 2, "names": ["b"]}, "warmup": None}
    made = from_values(Outer, values)
    assert made == Outer("/home/of/x", "", {"/home/of/a": 1.0, "b": 2.5}, Inner(7, 2.0, ("b",)))
    assert isinstance(made.inner.scale, float)


def test_what_is_left_empty_is_as_if_it_were_not_there():
    assert read_fields(Outer, {"run": None, "warmup": None, "inner": None, "weights": None}) == {"warmup": None}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inner": {"size": 0}}, "'inner.size' must be at least 1, got 0"),
        ({"inner": {"size": 2**31}}, "'inner.size' must be at most 2147483647, got 2147483648"),
        ({"inner": {"size": True}}, "'inner.size': an integer was expected, got True"),
        ({"inner": {"size": 10**5000}}, "'inner.size': an integer of at most 64 bits was expected"),
        ({"inner": {"scale": float("nan")}}, "'inner.scale' must be a finite number, got nan"),
        ({"inner": {"scale": float("inf")}}, "'inner.scale' must be a finite number, got inf"),
        ({"inner": {"limits": [0, float("nan")]}}, "must be a finite number, got nan"),
        ({"inner": {"limits": [0]}}, "'inner.limits': a list of 2 was expected, got [0]"),
        ({"weights": {"a": 0}}, "'weights.a' must be more than 0, got 0.0"),
        ({"axis": 0}, "'axis' must be at least 1 or -1, got 0"),
        ({"run": ""}, "'run' must be the name of a file or a folder, got ''"),
        ({"run": "a\0b"}, "'run' must be a path, which has no character of code 0"),
        ({"run": "~no-such-user/x"}, "'run' must be a path that begins with the home of a known user"),
        ({"innr": {}}, "unknown key 'innr' (did you mean 'inner'?)"),
        ({"inner.size": 1}, "unknown key 'inner.size'"),
        ({"inner": [1]}, "'inner' is a section with keys, got [1]"),
        ([1], "expected 'key: value' lines, got [1]"),
    ],
)
def test_what_a_field_does_not_take_is_one_line_that_names_it(values, says):
    with pytest.raises(InputError) as caught:
        read_fields(Outer, values, "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_made_in_python_is_held_to_the_same_ranges():
    check_fields(Outer())
    for wrong in (Outer(axis=-2), Outer(inner=Inner(scale=-1.0)), Outer(inner=3), Outer(run="~/x")):  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"'(axis|inner|inner.scale|run)'"):
            check_fields(wrong)
    assert read_again(Outer(source="~")).source.startswith("/")


def test_fields_change_by_dotted_name_and_the_rest_stays():
    assert with_fields(Outer(), {"inner.scale": 2.0, "axis": -1}) == Outer(inner=Inner(7, 2.0), axis=-1)
