"""What the pages name is there: commands that parse, files, names of the code, flags."""

import importlib
import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, commands
from tttlm.adaptation.experiment import ImagesConfig
from tttlm.cli.arguments import parse
from tttlm.cli.compare import read_comparison
from tttlm.cli.generate import GenerateConfig
from tttlm.cli.prepare import PrepareArguments
from tttlm.comparison.experiment import CompareConfig
from tttlm.evaluation.config import EvalConfig
from tttlm.fields import field_kinds
from tttlm.training.config import TrainConfig, check

PROGRAM = re.compile(r"(?:python3? (?:(train|eval)\.py|-m tttlm\.cli\.(\w+))|\btttlm-(\w+))(?= )(.*)")
ENDS = {"&&", "||", "&", "|", ";"}


def words_of(line: str) -> list[str]:
    """The words up to the end of the command, with 0 for a variable of the shell."""
    line = re.sub(r"\$\w+", "0", line)
    line = line.removesuffix("'") if line.count("'") % 2 else line
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in ENDS:
            break
        words.append(word)
    return words


COMMANDS = sorted(
    {
        (name, found[1] or found[2] or found[3], found[4])
        for name, text in PAGES.items()
        for found in PROGRAM.finditer(commands(text))
        if "..." not in found[4]
    }
)


class Parsed(Exception):
    """The arguments are read; the command would begin."""


def test_most_pages_have_commands():
    assert len(COMMANDS) > 45
    assert {program for _, program, _ in COMMANDS} == {
        *("adapt", "compare", "convert", "eval", "generate", "plot", "prepare", "shift", "train")
    }


@pytest.mark.parametrize(("page", "program", "line"), COMMANDS)
def test_every_command_is_one_that_its_program_takes(page, program, line, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = words_of(line)
    if "--tyro-write-completion" in words:
        words[-1] = str(tmp_path / "completion")
    if program == "compare":
        read_comparison(words)
        return
    module = importlib.import_module(f"tttlm.cli.{program}")

    def stop(*args: Any, **options: Any) -> None:
        config = parse(*args, **options)
        if isinstance(config, TrainConfig):
            check(config)
        raise Parsed

    monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(SystemExit if "--help" in words or "--tyro" in line else Parsed) as left:
        module.main(words)
    assert getattr(left.value, "code", None) in (None, 0)


def test_a_command_that_its_program_does_not_take_would_be_found(monkeypatch, tmp_path):
    with pytest.raises(Exception, match="unknown flag"):
        test_every_command_is_one_that_its_program_takes("", "train", " --modle 4", monkeypatch, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"(?<![\w./])((?:tttlm|tests|configs|docs|benchmarks)/[\w./-]*\w)(?![\w*{])", PAGES[page])
    missing = [path for path in named if not (ROOT / path).exists() and "NAME" not in path]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_code_that_a_page_mentions_is_there(page):
    for name in re.findall(r"`(tttlm(?:\.\w+)+)", PAGES[page]):
        assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether it is a module, or an attribute or a field of what is in one."""
    parts = name.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        try:
            found = importlib.import_module(".".join(parts[: i + 1]))
        except ModuleNotFoundError:
            if is_dataclass(found) and part in {field.name for field in fields(found)}:
                return i == len(parts) - 1
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_section_is_a_field(page):
    configs = (TrainConfig, CompareConfig, EvalConfig, GenerateConfig, ImagesConfig, PrepareArguments)
    known = {name for config in configs for name in dict(field_kinds(config))}
    for flag in re.findall(r"--(?:train\.)?((?!models\.|train\.)[a-z]\w*(?:\.[\w-]+)+)", PAGES[page]):
        section, _, name = flag.replace("-", "_").rpartition(".")
        assert {f"{section}.{name}", f"{section}.{name.removeprefix('no_')}"} & known, flag


def test_extras_and_targets_of_make_are_declared():
    text = "\n".join(PAGES.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {one for group in re.findall(r"'(?:tttlm|\.)\[([\w,]+)\]'", text) for one in group.split(",")}
    assert extras >= {"train", "cuda"}
    assert extras <= set(project["optional-dependencies"])
    targets = re.findall(r"(?:\$ |`)make (?:PYTHON=\S+ )?([a-z-]+)", text)
    declared = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"train", "test", "docs"} <= set(targets) <= set(declared)


def test_the_map_of_the_papers_has_every_learner_config_and_theorem():
    page = PAGES["docs/paper-map.md"]
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ") and "in the paper" not in row]
    assert len(rows) > 20
    for where, what, code, proof in rows:
        assert "`" in code, (where, what)
        assert "`" in proof or "](" in proof, (where, what)
