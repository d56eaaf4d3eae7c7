"""Each call to the system fails once under each command: the command refuses or ends in one line, never by a traceback.

First the command runs and its calls are noted: what is called, on which file. Then it runs once for each of them, and
that one fails.
"""

import builtins
import errno
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_plot import write_run
from tests.training.small import prepare_config, small_config, write_texts
from tttlm.cli import compare, eval, plot, train
from tttlm.cli.faults import describe
from tttlm.data import prepare
from tttlm.errors import CannotWrite, InputError
from tttlm.training import loop
from tttlm.training.loop import Outcome

CALLS = (
    *((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "mkdir"), (os, "listdir"), (os, "scandir")),
    *((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "fsync")),
)
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.EROFS, errno.ENOTDIR)
Key = tuple[str, str]


@contextmanager
def failing(folder: Path, target: Key | None, number: int) -> Iterator[list[Key]]:
    """Notes the calls on what is in `folder`, each kind once, and fails the one of kind `target`."""
    seen: list[Key] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if text.startswith(str(folder)) or name == "fsync":
                key = (name, re.sub(r"\d+", "#", text.removeprefix(str(folder))))
                if key not in seen:
                    seen.append(key)
                if key == target:
                    raise OSError(number, os.strerror(number), text or None)
            return call(path, *args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield seen


def every_call_fails_once(command: Callable[[Path], Any], original: Path, copy: Path) -> int:
    """Runs `command` on copies of a folder, each time with another call failing; returns how many there were."""

    def attempt(target: Key | None, number: int = 0) -> list[Key]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        with failing(copy, target, number) as seen:
            try:
                command(copy)
            except Exception as error:
                assert target is not None, "the command does not even work"
                line, status = describe(error, "kept")
                of_the_system = isinstance(error, (InputError, CannotWrite, OSError)) or os.strerror(number) in line
                assert of_the_system, f"{target}, {os.strerror(number)}: {line}"
                assert status in (1, 2)
                assert "\n" not in line
        return seen

    keys = attempt(None)
    for key, number in zip(keys, itertools.cycle(ERRORS), strict=False):
        attempt(key, number)
    return len(keys)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "original"
    prepare(prepare_config(write_texts(folder / "texts")), folder / "data")
    return folder


def test_plot(tmp_path):
    write_run(tmp_path / "original" / "run")
    command = lambda folder: plot.main([str(folder / "run"), "--png", str(folder / "x.png")])
    assert every_call_fails_once(command, tmp_path / "original", tmp_path / "copy") >= 3


@pytest.mark.long
def test_the_start_of_training(prepared, tmp_path, monkeypatch):
    """Up to where the first step would be compiled."""

    class Experiment:
        def __init__(self, *_: Any) -> None: ...

        def fit(self) -> Outcome:
            return Outcome("finished", 12, 0, "finished", 1.0)

    monkeypatch.setattr(loop, "_Experiment", Experiment)
    monkeypatch.setattr(train, "conclude", lambda config: None)
    (prepared / "c.yaml").write_text(
        "model: {vocab_size: 300, hidden_size: 16, num_layers: 2, num_heads: 2, mixers: [attention]}\n"
        "steps: 12\nbatch_size: 4\nsequence_length: 32\nmetrics: {tensorboard: off}\n"
    )

    def command(folder: Path) -> None:
        words = ["--config", folder / "c.yaml", "--run", folder / "run", "--data.path", folder / "data"]
        words += ["--distributed.mode", "off"]  # this process has used JAX already
        assert train.main([str(word) for word in words]) == 0

    assert every_call_fails_once(command, prepared, tmp_path / "copy") >= 10


def test_the_start_of_a_comparison(prepared, tmp_path, monkeypatch):
    """Up to where the first model would be trained, in a process of its own."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as the command sets it; put back afterwards
    (prepared / "compare.yaml").write_text(
        "train: {steps: 2, batch_size: 2, sequence_length: 32, metrics: {tensorboard: off}}\n"
        "models: {a: {model: {vocab_size: 300, hidden_size: 16, num_layers: 1, num_heads: 2}}}\n"
    )

    class Started(Exception):
        pass

    def run_children(commands: Iterator[Any], *_: Any) -> Any:
        next(commands)
        raise Started

    monkeypatch.setattr("tttlm.comparison.children.run_children", run_children)

    def command(folder: Path) -> None:
        words = [folder / "compare.yaml", "--data", folder / "data", "--output", folder / "out"]
        with pytest.raises(Started):
            compare.main([str(word) for word in words])

    assert every_call_fails_once(command, prepared, tmp_path / "copy") >= 8


@pytest.mark.slow
def test_an_evaluation(prepared, tmp_path):
    loop.train(small_config(prepared / "run", prepared / "data", steps=1))
    command = lambda folder: eval.main([str(folder / "run"), "--text", str(folder / "texts" / "00.txt")])
    assert every_call_fails_once(command, prepared, tmp_path / "copy") >= 10
