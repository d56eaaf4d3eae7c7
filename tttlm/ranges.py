"""Ranges of fields, which are part of their types and are checked by every reader of a value:

batch_size: Count = 16
b2: Annotated[float, Range(least=0, below=1)] = 0.95
run: OutputPath = "runs/default"
"""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any


class Rule:
    """The rule in `Annotated[type, rule]`, by which every value is read."""

    def read(self, value: Any) -> Any:
        """Returns the value as it is stored in the field.

        Raises:
            ValueError: the value is invalid; the message continues the words "must be".
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Rule):
    """The numbers that a field accepts. NaN is in no range, and infinity only with `infinite`.

    Attributes:
        least: inclusive lower bound.
        above: exclusive lower bound.
        most: inclusive upper bound.
        below: exclusive upper bound.
        also: accepted numbers outside the bounds.
        infinite: whether infinity is accepted.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    infinite: bool = False

    def read(self, value: float) -> float:
        if value in self.also:
            return value
        finite = isinstance(value, int) or math.isfinite(value) or (self.infinite and not math.isnan(value))
        rules = (
            ("a finite number", finite),
            (f"at least {self.least}", self.least is None or value >= self.least),
            (f"more than {self.above}", self.above is None or value > self.above),
            (f"at most {self.most}", self.most is None or value <= self.most),
            (f"less than {self.below}", self.below is None or value < self.below),
        )
        for rule, holds in rules:
            if not holds:
                raise ValueError(" or ".join([rule, *map(str, self.also)]))
        return value


@dataclass(frozen=True)
class PathName(Rule):
    """The path of a file or a folder; `~` at its start is the home folder of the user.

    Attributes:
        empty: whether it may be empty, which means no path.
    """

    empty: bool = True

    def read(self, value: str) -> str:
        if not value and not self.empty:
            raise ValueError("the name of a file or a folder")
        if "\0" in value:
            raise ValueError("a path, which has no character of code 0")
        path = os.path.expanduser(value)
        if path.startswith("~"):
            raise ValueError("a path that begins with the home of a known user (./~name: a file called ~name)")
        return path


@dataclass(frozen=True)
class PictureName(PathName):
    """The path of a picture with a file name extension that can be drawn; or empty."""

    def read(self, value: str) -> str:
        path = super().read(value)
        if path and not path.lower().endswith((".png", ".pdf", ".svg")):
            raise ValueError("a file name that ends in .png, .pdf or .svg")
        return path


LARGEST = 2**31 - 1  # the largest int32, JAX's type of indices
LARGEST_FLOAT32 = 3.4e38
Count = Annotated[int, Range(least=1, most=LARGEST)]
CountOrZero = Annotated[int, Range(least=0, most=LARGEST)]
Size = Annotated[int, Range(least=1, most=2**20)]  # size of an axis of a parameter; the largest models have 2**17
SizeOrZero = Annotated[int, Range(least=0, most=2**20)]
PositiveFloat = Annotated[float, Range(above=0, most=LARGEST_FLOAT32)]
NonNegativeFloat = Annotated[float, Range(least=0, most=LARGEST_FLOAT32)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
FilePath = Annotated[str, PathName()]
PicturePath = Annotated[str, PictureName()]
OutputPath = Annotated[str, PathName(empty=False)]
