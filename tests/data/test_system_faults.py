"""Whatever the operating system refuses while text is prepared is one line; what was finished stays."""

import builtins
import errno
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.data.small import contents, make_text, small_config
from tttlm.data import PrepareConfig, load_tokenizer, open_data, prepare, store, writing
from tttlm.data.config import DataConfig
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.data.workers import workers as start_workers
from tttlm.errors import InputError

ROOT = Path(__file__).parents[2]
CALLS: list[tuple[Any, str]] = [
    *((builtins, "open"), (io, "open")),
    *((os, name) for name in ("open", "fsync", "replace", "rename", "mkdir", "stat", "scandir", "listdir", "unlink")),
]
ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPIPE, errno.EMFILE]


class Refusing:
    """Lets system calls on files below a folder through, except the one of a given number."""

    def __init__(self, folder: Path, refused: int, code: int) -> None:
        self.folder, self.refused, self.code, self.seen = str(folder), refused, code, 0
        self.what = ""

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            at = arguments[0] if arguments else ""
            if (isinstance(at, (str, os.PathLike)) and str(at).startswith(self.folder)) or name == "fsync":
                self.seen += 1
                if self.seen == self.refused:
                    self.what = f"{name} {at}"
                    raise OSError(self.code, os.strerror(self.code), None if name == "fsync" else str(at))
            return call(*arguments, **options)

        return wrapped

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for module, name in CALLS:
            patch.setattr(module, name, self.wrap(name, getattr(module, name)))


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for i in range(3):
        (folder / f"{i}.txt").write_text(make_text(i, 150))
    return folder


def attempts(few_texts: Path, tmp_path: Path, config: PrepareConfig) -> Iterator[tuple[Refusing, Path]]:
    """One after another, every system call of a preparation, until there are no more."""
    number = 0
    while True:
        number += 1
        folder = tmp_path / "below" / str(number)
        refusing = Refusing(tmp_path, number, ERRORS[number % len(ERRORS)])
        yield refusing, folder
        if refusing.seen < number:
            assert number > 60  # the calls were really counted
            return
        shutil.rmtree(folder, ignore_errors=True)


def test_each_system_call_that_fails_is_one_line_and_nothing_finished_is_lost(
    few_texts: Path, tmp_path: Path, sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(few_texts, source)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the disk need not turn for this
    config = small_config(source, sentencepiece_file, shard_mb=0.0015, held_out=0.3)
    prepare(config, tmp_path / "whole")
    whole, said = contents(tmp_path / "whole"), []
    for refusing, folder in attempts(few_texts, tmp_path, config):
        with pytest.MonkeyPatch.context() as patch:
            refusing.install(patch)
            try:
                prepare(config, folder)
            except InputError as error:
                said.append(str(error))
        if (folder / store.MANIFEST).exists():
            open_data(DataConfig(path=str(folder)), split="train", batch_size=1, sequence_length=8)
        prepare(config, folder)
        assert contents(folder) == whole, refusing.what
    assert len(said) > 40
    assert not [text for text in said if "\n" in text]


@pytest.mark.parametrize("code", ERRORS)
def test_reading_prepared_data_that_the_system_refuses_is_one_line(prepared: Path, tmp_path: Path, code: int) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    number, said = 0, []
    while True:
        number += 1
        refusing = Refusing(tmp_path / "data", number, code)
        with pytest.MonkeyPatch.context() as patch:
            refusing.install(patch)
            try:
                open_data(DataConfig(path=str(tmp_path / "data")), split="train", batch_size=1, sequence_length=8)
            except InputError as error:
                said.append(str(error))
        number += 6 * (number > 20)  # of the many files only some
        if refusing.seen < number:
            break
    assert len(said) > 5
    assert not [text for text in said if "\n" in text]


def test_a_folder_whose_name_is_too_long_or_goes_through_a_file_is_one_line(tmp_path: Path, few_texts: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder, said in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "file" / "below", "Not a directory|File exists"),
        (tmp_path / "file", "is a file"),
        (Path("/proc/nothing/data"), "No such file|Permission denied|Read-only"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            prepare(small_config(few_texts, "bytes"), folder)
        assert "\n" not in str(caught.value)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tttlm.cli.prepare", *map(str, words)]


def test_a_closed_output_does_not_stop_a_preparation(tmp_path: Path, few_texts: Path) -> None:
    """As `prepare ... 2>&1 | head -0` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(few_texts, "--output", tmp_path / "data", "--tokenizer", "bytes"),
        stdout=writer,
        stderr=writer,
        cwd=ROOT,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "data" / store.MANIFEST).exists()


# Locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_flock_a_lock_file_is_used(
    tmp_path: Path, few_texts: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    config = small_config(few_texts, "bytes", held_out=0.0)
    with writing.locked(tmp_path / "data"), pytest.raises(InputError, match="is being prepared by another process"):
        prepare(config, tmp_path / "data")
    prepare(config, tmp_path / "data")
    assert (tmp_path / "data" / store.MANIFEST).exists()


def test_processes_that_die_end_the_work_and_nobody_waits_for_them() -> None:
    begin = time.monotonic()
    task = [(b"some text", False)] * 10
    with start_workers(ByteTokenizer(), "uint16", 2) as pool:
        pool.submit(task).result()
        pool._processes[0].kill()
        results = [pool.submit(task) for _ in range(20)]
        pool._processes[1].kill()
        results += [pool.submit(task) for _ in range(5)]
        for result in results[-5:]:
            with pytest.raises(InputError, match="a tokenizing process died"):
                result.result(timeout=30)
    assert time.monotonic() - begin < 60


def test_a_lock_is_held_for_one_and_waited_for_by_another(tmp_path: Path) -> None:
    with writing.locked(tmp_path / "data"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "data" / ".lock").acquire(timeout=0)
    with writing.locked(tmp_path / "data"):
        pass


# Tokenizers that cannot do it


def test_a_tokenizer_that_cannot_encode_a_text_is_one_line(tmp_path: Path, few_texts: Path) -> None:
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<none>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    for workers in (1, 2):
        config = small_config(few_texts, tmp_path / "tokenizer.json", eos=False, workers=workers)
        with pytest.raises(InputError, match="the tokenizer cannot encode a text") as caught:
            prepare(config, tmp_path / "data")
        assert "\n" not in str(caught.value)
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 2
