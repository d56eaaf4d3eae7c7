"""From a command line to a typed configuration: a YAML file becomes flags ahead of the person's own flags, so that
one set of rules checks both. Whatever is wrong comes out as one line (`InputError`)."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from tttlm.errors import InputError

C = TypeVar("C")


def parse(cls: type[C], arguments: Sequence[str], *, prog: str, description: str = "") -> C:
    """Builds `cls`, a dataclass of dataclasses, from `--config FILE` and flags such as `--model.hidden_size 256`.

    A later source wins: the defaults of `cls`, then `base:` of the file, the file, the flags. `--help` prints every
    field with its default and leaves.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type, a file that cannot be read.
    """
    fields = dict(_fields(cls))
    config_file, flags = take_option(arguments, "--config", "the name of a YAML file")
    values = read_config(config_file) if config_file else {}
    help_wanted = bool({"-h", "--help"} & set(flags))
    given = {_refuse_unknown_flag(flag, fields, prog) for flag in flags if flag.startswith("--")}
    from_file = list(_as_flags(values, fields, config_file))
    try:
        with _one_line_errors():
            return tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=["--help"] if help_wanted else [*from_file, *flags],
                use_underscores=True,
            )
    except InputError as error:
        source = config_file if config_file and not _mentions(str(error), given) else prog
        raise InputError(f"{source}: {error}") from None


def read_config(path: str | Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a nested dict.

    `base: other.yaml` or `base: [one.yaml, two.yaml]`, relative to the file, are read first: each overrides those
    before it, and the file all of them. `inside` are the files that are being read, each the base of the one before.
    """
    path = Path(path)
    if path.resolve() in inside:
        raise InputError(f"{path}: is its own base, by way of {inside[-1].name}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, got a {type(values).__name__}")
    base = values.pop("base", [])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: 'base' names another YAML file or a list of them, got {base!r}")
    whole: dict[str, Any] = {}
    for name in names:
        whole = merged(whole, read_config(path.parent / name, (*inside, path.resolve())))
    return merged(whole, values)


def as_flags(cls: type, values: dict[str, Any], source: str) -> list[str]:
    """Nested values as the flags that set them in `cls`; `source` is where they come from, for an error.

    Raises:
        InputError: a name that no field has, or a value that cannot be meant.
    """
    return list(_as_flags(values, dict(_fields(cls)), source))


def take_option(arguments: Sequence[str], flag: str, what: str) -> tuple[str | None, list[str]]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments: the value, None where there is none, and the rest.

    Raises:
        InputError: the flag is there without a value; it needs `what`.
    """
    value, rest, waiting = None, [], False
    for argument in arguments:
        if waiting:
            value, waiting = argument, False
        elif argument == flag:
            waiting = True
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if waiting or value == "":
        raise InputError(f"{flag} needs {what}")
    return value, rest


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Leaves the process with the status that `command` returns; an `InputError` is printed as one line, status 2."""
    try:
        sys.exit(command() or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        sys.exit(130)


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field; nested dataclasses appear as well as what is in them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        yield name, kind
        if dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type, kind), name + ".")


def _refuse_unknown_flag(flag: str, fields: dict[str, Any], prog: str) -> str:
    name = flag[2:].partition("=")[0].replace("-", "_")
    *parts, last = name.split(".")
    positive = ".".join([*parts, last.removeprefix("no_")])
    for known in (name, positive):
        if known in fields and not dataclasses.is_dataclass(fields[known]):
            return known
    if name == "help":
        return name
    raise InputError(f"{prog}: unknown flag '{flag.partition('=')[0]}'{_nearest(name, fields, '--')}")


def _as_flags(values: dict[str, Any], fields: dict[str, Any], path: str | None, prefix: str = "") -> Iterator[str]:
    """The values of a file as command-line tokens."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in fields:
            raise InputError(f"{path}: unknown key '{name}'{_nearest(name, fields, '')}")
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"{path}: '{name}' holds further keys, got {value!r}")
            yield from _as_flags(value, fields, path, name + ".")
        elif kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"{path}: '{name}' is true or false, got {value!r}")
            *parts, last = name.split(".")
            yield "--" + ".".join([*parts, last if value else f"no_{last}"])
        else:
            yield from (f"--{name}", *_tokens(value))


def _tokens(value: Any) -> Iterator[str]:
    """A YAML value as the words one would type; lists and mappings are flattened in order."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tokens(item)
    else:
        yield str(value)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, those of `over` winning."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _nearest(name: str, fields: dict[str, Any], dashes: str) -> str:
    """' (did you mean ...?)' for the closest known name, looked for among whole names and among last parts."""
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
    if not close:
        last = name.rpartition(".")[2]
        close = [known for known in fields if known.rpartition(".")[2] == last][:1]
    return f" (did you mean '{dashes}{close[0]}'?)" if close else " (--help lists them all)"


def _mentions(message: str, given: set[str]) -> bool:
    return any(f"--{name}" in message.replace("-", "_").replace("__", "--") for name in given)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Reduces the box that tyro prints to the sentence in it."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            yield
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        lines = [line.strip("│ \t") for line in caught.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        message: list[str] = []
        for line in lines:
            if line.startswith("──"):
                break
            message.append(line)
        text = " ".join(message) or "the arguments cannot be used"
        raise InputError(re.sub(r"^Error parsing ", "", text)) from None
