"""An extension of Griffe: `a, b: two samples` in a docstring describes both parameters, as it does for a reader."""

import re
from typing import Any

import griffe

# The names, and the description with its further lines, which are indented deeper.
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)$", re.MULTILINE)


class SharedParameters(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SHARED.sub(_each, obj.docstring.value)


def _each(found: re.Match[str]) -> str:
    indent, names, description = found.groups()
    return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))
