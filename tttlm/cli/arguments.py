"""Builds a typed configuration from a command line: defaults, then a YAML file and its bases, then flags.

Files and flags have the same types and ranges. Every error is one line (`InputError`).
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import tttlm
from tttlm.cli.faults import run_command as run_command  # for those who parse as well
from tttlm.errors import InputError
from tttlm.fields import field_kinds, is_section, nearest, read_again, read_fields, type_hints, with_fields
from tttlm.records import shown
from tttlm.yaml_file import read_yaml

C = TypeVar("C")
CONFIGS = Path(tttlm.__file__).parent / "configs"


def parse(
    cls: type[C], arguments: Sequence[str], *, prog: str, description: str = "", values: Mapping[str, Any] | None = None
) -> C:
    """Builds `cls`, a dataclass of dataclasses, from `--config FILE` and flags such as `--model.hidden_size 256`.

    A later source overrides an earlier one: the defaults of `cls`, `values`, `base:` of the file, the file, the flags.
    `--help` prints every field with its default and exits.

    Args:
        cls: a configuration class.
        arguments: the arguments of the program.
        prog: the name of the program.
        description: the text of `--help` above the fields.
        values: dotted name -> value, defaults that differ from those of `cls`.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type or outside its range, a file that cannot be read.
    """
    config_file, flags = take_option(arguments, "--config", "the name of a YAML file")
    known = dict(field_kinds(cls))
    for flag in flags:
        if flag.startswith("--"):
            _refuse_unknown_flag(flag, known, prog)
    given = {**(values or {}), **(read_config(cls, config_file) if config_file else {})}
    # Constraints between fields are checked at the end: a flag may fix an invalid file.
    default = with_fields(cls(), given, check=False)
    if {"-h", "--help"} & set(flags):
        _join_descriptions(cls)
    with _one_line_errors(f"{prog}: " if flags or not config_file else f"{config_file}: "):
        config = tyro.cli(
            cls,
            prog=prog,
            description=description,
            args=flags,
            default=default,
            use_underscores=True,
            registry=_REGISTRY,
        )
        return read_again(config)


def program(default: str) -> str:
    """The name of the program for messages and shell completion: that of the console script if it is one."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("tttlm-") else default


def read_config(cls: type, path: str | Path) -> dict[str, Any]:
    """The fields of `cls` in a YAML file and its bases, as dotted name -> value.

    `base: other.yaml` or `base: [one.yaml, two.yaml]`, relative to the file, are read first: each overrides those
    before it, and the file overrides all of them. Fields are replaced, not merged: so are lists and mixtures.

    Raises:
        InputError: a file cannot be read, or has an unknown key or an invalid value.
    """
    found = find_config(path)
    return read_section(cls, read_yaml(found), found, str(path))


def find_config(name: str | Path) -> Path:
    """The file of that name, or, if there is none, the configuration of that name in the package.

    `quickstart`, `125m/ttt_linear_mamba` and `configs/quickstart.yaml` name such configurations from any folder.
    """
    path = Path(name).expanduser()
    if os.path.exists(path) or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    shipped = CONFIGS.joinpath(*parts)
    for candidate in (shipped, shipped.with_name(f"{shipped.name}.yaml")):
        if parts and ".." not in parts and os.path.isfile(candidate):
            return candidate
    if "." not in path.name:  # not the name of a file
        names = [str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yaml")]
        close = difflib.get_close_matches(str(path)[:100], names, n=1)
        hint = f"did you mean {close[0]}?" if close else "name a YAML file, or quickstart for instance"
        raise InputError(f"there is neither a file {shown(str(path))} nor a configuration of that name: {hint}")
    return path


def read_section(cls: type, values: Any, file: Path, source: str, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The same as `read_config` for a section of a file, which may have a `base` of its own.

    Args:
        cls: the configuration class of the section.
        values: the section, as read from `file`.
        source: the name of the section in errors.
        inside: the files that are being read, each the base of the previous one.
    """
    own, bases = split_bases(values, file, source, inside)
    whole: dict[str, Any] = {}
    for base in bases:
        whole |= read_section(cls, read_yaml(base), base, str(base), (*inside, file.resolve()))
    return {**whole, **read_fields(cls, own, source)}


def split_bases(values: Any, file: Path, source: str, inside: tuple[Path, ...] = ()) -> tuple[Any, list[Path]]:
    """The values of a section itself, and the files that its `base` names; arguments as for `read_section`.

    Raises:
        InputError: `base` names no file, or a file that is being read.
    """
    if not isinstance(values, dict) or "base" not in values:
        return values, []
    base = values["base"]
    names = [base] if isinstance(base, str) else [] if base is None else base
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise InputError(f"{source}: 'base' names another YAML file or a list of them, got {shown(base)}")
    paths = [file.parent / Path(name).expanduser() for name in names]
    for path in paths:
        if path.resolve() in (*inside, file.resolve()):
            raise InputError(f"{path}: is its own base, through {file.name}")
        if len(inside) > 20:
            raise InputError(f"{path}: bases are nested more than 20 deep")
    return {key: value for key, value in values.items() if key != "base"}, paths


def take_option(arguments: Sequence[str], flag: str, what: str) -> tuple[str | None, list[str]]:
    """Removes `flag VALUE` or `flag=VALUE` from the arguments: the value, None if there is none, and the rest.

    Raises:
        InputError: the flag is given without a value (described by `what`), or twice.
    """
    values, rest, waiting = [], [], False
    for argument in arguments:
        if waiting:
            values.append(argument)
            waiting = False
        elif argument == flag:
            waiting = True
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if waiting or "" in values:
        raise InputError(f"{flag} needs {what}")
    if len(values) > 1:
        raise InputError(f"{flag} is given twice: remove {values[0]} or {values[1]}")
    return values[0] if values else None, rest


def _refuse_unknown_flag(flag: str, known: Mapping[str, Any], prog: str) -> None:
    name = flag[2:].partition("=")[0].replace("-", "_")
    *parts, last = name.split(".")
    for other in (name, ".".join([*parts, last.removeprefix("no_")])):
        if other in known and not is_section(known[other]):
            return
    if name == "help" or name.startswith("tyro_"):
        return
    known = {**known, "config": None}
    raise InputError(f"{prog}: unknown flag '{shown(flag.partition('=')[0], quote=False)}'{nearest(name, known, '--')}")


def _join_descriptions(cls: Any) -> None:
    """Joins the lines of the description of every field; tyro would print them as they are broken in the source."""
    joined: dict[str, str] = {}
    owners: list[Any] = [owner for owner in reversed(cls.__mro__) if dataclasses.is_dataclass(owner)]
    for owner in owners:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        for field, text in pairwise(tree.body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                joined[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    kinds = type_hints(cls)
    for one in dataclasses.fields(cls):
        if is_section(kinds[one.name]):
            _join_descriptions(kinds[one.name])
        if one.name in joined:
            one.metadata = MappingProxyType({**one.metadata, "help": joined[one.name]})


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`--data.mixture A 0.5 B 2` replaces the mapping, also if a file has entries of it."""
    if info.type_origin is not dict:
        return None

    def build(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError(f"a name and a weight for each, got {len(words)} words")
        return {name: float(weight) for name, weight in zip(words[::2], words[1::2], strict=True)}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME WEIGHT [NAME WEIGHT ...]]",
        instance_from_str=build,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for item in value.items() for word in item],
    )


@contextlib.contextmanager
def _one_line_errors(begin: str) -> Iterator[None]:
    """Reduces the box that tyro prints to its sentence, after `begin`."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            yield
    except InputError as error:
        raise InputError(f"{begin}{error}") from None
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        text = _sentence(caught.getvalue())
        # tyro adds "Error parsing model: ..." if a dataclass itself refuses, which names the field again.
        text = (
            re.sub(r"^Error parsing (?:(?!--)\S+: )?", "", text)
            .partition("; use sys.")[0]
            .partition(". Got errors:")[0]
        )
        if text.startswith("Unrecognized options"):
            text += " (a configuration is named with --config, and values with the names of their fields)"
        raise InputError(f"{begin}{text}") from None


def _sentence(box: str) -> str:
    """The sentence in a box of tyro, below the title, which is part of the frame if the terminal has UTF-8."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))):
        if line and not line.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    sentence = parts[0] if "╭" in box or len(parts) == 1 else parts[1]
    return " ".join(" ".join(sentence).split()) or "the arguments cannot be used"
