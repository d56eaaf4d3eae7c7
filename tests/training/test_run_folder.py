"""The folder of a run: claimed by what begins and by nothing else, locked everywhere, read strictly."""

import errno
import fcntl
import os
from pathlib import Path

import filelock
import pytest

from tests.training.small import small_config
from tttlm.data import save_tokenizer
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.errors import InputError
from tttlm.training import run_folder
from tttlm.training.run_folder import RunFacts, RunFolder

FACTS = RunFacts("data", ByteTokenizer().fingerprint, "held out", "/data")


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(small_config(path), FACTS, ByteTokenizer())
    return folder


def test_what_never_began_leaves_nothing_and_what_began_stays(tmp_path):
    folder = claimed(tmp_path / "a" / "b" / "run")
    folder.release()
    assert os.listdir(tmp_path) == []

    folder = claimed(tmp_path / "a" / "b" / "run")
    folder.keep()
    folder.release()
    assert folder.read_config() == small_config(folder.path)
    assert folder.read_facts() == FACTS


def test_a_refused_start_leaves_the_run_that_is_there_as_it_was(tmp_path):
    folder = claimed(tmp_path / "run")
    folder.keep()
    folder.release()
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    again = RunFolder(folder.path)
    again.claim(small_config(folder.path, **{"checkpoint.every": 7}), FACTS, ByteTokenizer())
    assert again.read_config().checkpoint.every == 7
    again.release()  # refused before a step was taken
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="the held-out text changed since this run started"):
        again.claim(small_config(folder.path), RunFacts("data", FACTS.tokenizer, "x", "/data"), ByteTokenizer())
    again.release()
    assert folder.read_facts() == FACTS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("rope_theta: 10000.0", "rope_theta: 10001.0"), "was altered since the run wrote it"),
        (lambda text: text.partition("\n")[2], "was not written by this version of tttlm"),
        (lambda text: text.replace("# tttlm 0", "# tttlm 9", 1), "is a run of version 9"),
        (lambda text: "model: {width: 32}\n", "runs of version 0.1.0 need that version"),
        (lambda text: "", "was not written by this version"),
        (lambda text: "\x00\xff", "was not written by this version"),
    ],
)
def test_a_configuration_that_is_not_what_the_run_wrote_is_one_line(tmp_path, change, says):
    folder = claimed(tmp_path / "run")
    text = folder.config.read_text()
    assert change(text) != text
    folder.config.write_text(change(text))
    with pytest.raises(InputError, match=says) as caught:
        folder.read_config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data.json", "tokenizer/tokenizer_facts.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"other": 1}', b"{"])
def test_small_files_that_cannot_be_read_are_one_line_that_names_them(tmp_path, name, content):
    folder = claimed(tmp_path / "run")
    (folder.path / name).write_bytes(content)
    read = {"data.json": folder.read_facts, "config.yaml": folder.read_config}.get(name, folder.read_tokenizer)
    with pytest.raises(InputError, match=name) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_run_with_checkpoints_whose_data_is_not_known_does_not_go_on_with_any(tmp_path):
    folder = claimed(tmp_path / "run")
    folder.keep()
    folder.release()
    (folder.checkpoints / "3" / "params").mkdir(parents=True)
    folder.facts.unlink()
    with pytest.raises(InputError, match=r"data\.json: is missing; restore the file"):
        claimed(tmp_path / "run")
    assert not folder.facts.exists()


def test_a_run_keeps_its_tokenizer_and_knows_another(tmp_path):
    folder = claimed(tmp_path / "run")
    assert folder.read_tokenizer().encode("ab") == ByteTokenizer().encode("ab")
    another = ByteTokenizer()
    another.name_controls(1, 2)
    save_tokenizer(another, folder.tokenizer)
    with pytest.raises(InputError, match="is not the tokenizer that the run was trained with"):
        folder.read_tokenizer()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_flock_does_not_exist_a_file_stands_in_for_it(tmp_path, monkeypatch, number):
    def missing(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on "):
        RunFolder(tmp_path / "run").lock()
    folder.release()
    folder.lock()
    folder.release()


def test_a_folder_that_cannot_be_made_or_locked_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        RunFolder(tmp_path / "file" / "run").lock()

    def broken(self, **options: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(filelock.FileLock, "acquire", broken)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot be created or locked: Input/output error"):
        folder.lock()
    folder.release()
    assert run_folder.FileLock is filelock.FileLock
