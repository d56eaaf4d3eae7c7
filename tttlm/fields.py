"""Reading and checking of configurations by their fields.

A configuration is a dataclass with a default for every field. A field that is itself such a dataclass is a section, and
`model.hidden_size` is the dotted name of a field in one. The type of a field defines its range (`tttlm.ranges`), which
is the same for files, flags and calls from Python.
"""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from tttlm.errors import InputError
from tttlm.records import RecordError, from_plain, shown

C = TypeVar("C")


def type_hints(cls: Any) -> dict[str, Any]:
    """The type of every field, with its rules."""
    return _cached_hints(cls)


@cache
def _cached_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def is_section(kind: Any) -> bool:
    """Whether a field of this type is a section."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def field_kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field; sections are included as well as their fields."""
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        yield name, kind
        if is_section(kind):
            yield from field_kinds(kind, f"{name}.")


def read_fields(cls: type, values: Any, source: str = "", prefix: str = "") -> dict[str, Any]:
    """Checks nested plain values, as read from a YAML or JSON file, against the fields of `cls`.

    An empty value (None) is ignored, except in a field that may be None.

    Args:
        cls: a configuration class.
        values: nested mappings from the names of fields.
        source: the origin of the values, for errors.
        prefix: the dotted name of the section that `cls` is, followed by a dot.

    Returns:
        Dotted name -> value of the field's type, for the fields in `values`.

    Raises:
        InputError: a name is unknown, or a value has another type or is outside its range.
    """
    begin = f"{source}: " if source else ""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        what = f"'{prefix[:-1]}' is a section with keys" if prefix else "expected 'key: value' lines"
        raise InputError(f"{begin}{what}, got {shown(values)}")
    known = dict(field_kinds(cls, prefix))
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in known or "." in str(key):
            raise InputError(f"{begin}unknown key '{shown(name, quote=False)}'{nearest(name, known)}")
        kind = known[name]
        if is_section(kind):
            result |= read_fields(kind, value, source, f"{name}.")
        elif value is not None or type(None) in typing.get_args(kind):
            result[name] = _read(value, kind, name, begin)
    return result


def with_fields(config: C, values: Mapping[str, Any], *, check: bool = True, prefix: str = "") -> C:
    """The configuration with some fields changed.

    Args:
        config: a configuration.
        values: dotted name -> value, as `read_fields` returns them.
        check: False skips the checks of the dataclasses, because more fields will be changed.
        prefix: the common prefix of the dotted names.
    """
    changes = {}
    for name, kind in type_hints(type(config)).items():
        dotted = prefix + name
        if is_section(kind):
            if any(key.startswith(f"{dotted}.") for key in values):
                changes[name] = with_fields(getattr(config, name), values, check=check, prefix=f"{dotted}.")
        elif dotted in values:
            changes[name] = values[dotted]
    if check:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    changed = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def from_values(cls: type[C], values: Any, source: str = "", prefix: str = "") -> C:
    """A configuration from nested plain values, for instance from a run's `config.yaml`.

    Raises:
        InputError: as in `read_fields`, or raised by the class itself.
    """
    return with_fields(cls(), read_fields(cls, values, source, prefix), prefix=prefix)


def field_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every field that is not a section."""
    hints = type_hints(type(config))
    for field in dataclasses.fields(config):
        name, kind, value = prefix + field.name, hints[field.name], getattr(config, field.name)
        if is_section(kind) and isinstance(value, kind):
            yield from field_values(value, f"{name}.")
        else:
            yield name, kind, value


def read_again(config: C) -> C:
    """The configuration with every value read as from a file: checked, and with `~` in paths expanded.

    Raises:
        InputError: names the field, the rule and the value.
    """
    values = {name: _read(value, kind, name) for name, kind, value in field_values(config)}
    return with_fields(config, values, check=False)


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuses a value that has another type than its field or is outside its range.

    Raises:
        InputError: names the field, the rule and the value.
    """
    for name, kind, value in field_values(config, prefix):
        if _read(value, kind, name) != value:
            raise InputError(f"'{name}' must be written out (a tuple for a list, a path without ~), got {shown(value)}")


def refuse_unused(config: Any, why: str, *names: str) -> None:
    """Refuses fields that would not be used but have another value than their default.

    Args:
        config: a configuration.
        why: the end of the message, such as "with --text".
        names: dotted names of fields, or of sections for all of their fields.

    Raises:
        InputError: names the field.
    """
    default = {name: value for name, _, value in field_values(type(config)())}
    for name, _, value in field_values(config):
        named = name in names or name.startswith(tuple(f"{section}." for section in names))
        if named and value != default[name]:
            raise InputError(f"{name} = {shown(value)} is not used {why}: leave it out")


def _read(value: Any, kind: Any, name: str, begin: str = "") -> Any:
    try:
        return from_plain(value, kind, name)
    except RecordError as error:
        raise InputError(f"{begin}{error}") from None


def nearest(name: str, known: Mapping[str, Any], dashes: str = "") -> str:
    """' (did you mean ...?)' for the closest known name, compared with full dotted names and with their last parts."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) < 100 else []
    if not close:
        last = name.rpartition(".")[2]
        close = [other for other in known if other.rpartition(".")[2] == last][:1]
    return f" (did you mean '{dashes}{close[0]}'?)" if close else " (--help lists them all)"
