"""What was saved is what is read: any byte of a prepared folder that changed is noticed by whoever reads it."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.small import contents, make_text, small_config
from tests.data.test_preparation import Interrupted, interrupted_at
from tttlm.data import (
    DataConfig,
    Tokenizer,
    held_out_documents,
    load_tokenizer,
    open_data,
    prepare,
    save_tokenizer,
    store,
)
from tttlm.data.report import describe_folder
from tttlm.errors import InputError

READERS: dict[str, Callable[[Path], object]] = {
    "training": lambda folder: open_data(DataConfig(path=str(folder)), split="train", batch_size=2, sequence_length=8),
    "validation": lambda folder: open_data(
        DataConfig(path=str(folder)), split="validation", batch_size=2, sequence_length=8
    ),
    "evaluation": lambda folder: list(held_out_documents(folder)),
    "inspect": lambda folder: list(describe_folder(folder)),
}


def flipped(path: Path, position: int) -> None:
    """Changes one bit, and puts the times of the file back, as a failing disk leaves them."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy that was read once, so that its files are known to be right."""
    shutil.copytree(prepared, tmp_path / "copy")
    for read in READERS.values():
        read(tmp_path / "copy")
    return tmp_path / "copy"


FILES = [
    *("part-00000/train.tokens", "part-00000/validation.tokens", "part-00000/validation.documents"),
    *("part-00002/part.json", "tokenizer.model", "manifest.json"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed_by_every_reader(copied: Path, reader: str, name: str) -> None:
    size = (copied / name).stat().st_size
    for position in random.Random(f"{reader} {name}").sample(range(size), 3):
        flipped(copied / name, position)
        with pytest.raises(InputError, match=name.rpartition("/")[2]) as caught:
            READERS[reader](copied)
        assert "\n" not in str(caught.value)
        flipped(copied / name, position)
    READERS[reader](copied)


SMALL = ["manifest.json", "part-00000/part.json", "prepare.json"]
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n",
    "not UTF-8": b'{"format": 3, "x": "\xff"}',
    "cut short": b'{"format": 3, "splits": {',
    "a list": b"[]",
    "a number": b"2",
    "null": b"null",
    "no keys": b"{}",
    "format alone": b'{"format": 3}',
    "other types": json.dumps({"format": 3, "parts": 3, "tokenizer": [], "sha256": 0}).encode(),
    "nested": b'{"format":' * 100_000,
    "digits": b'{"format": ' + b"9" * 5_000 + b"}",
    "zeros": bytes(1_000),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_with_other_content_is_one_line(
    prepared: Path, tmp_path: Path, text_folder: Path, sentencepiece_file: Path, name: str, kind: str
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(HOSTILE[kind])
    again = lambda folder: prepare(small_config(text_folder, sentencepiece_file), folder)
    with pytest.raises(InputError, match=name.rpartition("/")[2]) as caught:
        (again if name == "prepare.json" else READERS["training"])(tmp_path / "copy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_verification_cache_is_ignored(copied: Path, kind: str) -> None:
    (copied / ".verified.json").write_bytes(HOSTILE[kind])
    flipped(copied / "part-00001" / "train.tokens", 7)
    with pytest.raises(InputError, match=r"train\.tokens was altered"):
        READERS["training"](copied)


def test_the_verification_cache_of_another_folder_is_ignored(
    copied: Path, tmp_path: Path, text_folder, sentencepiece_file
) -> None:
    prepare(small_config(text_folder, sentencepiece_file, held_out=0.5), tmp_path / "other")
    flipped(copied / "part-00001" / "train.tokens", 7)
    shutil.copy2(tmp_path / "other" / ".verified.json", copied / ".verified.json")
    with pytest.raises(InputError, match=r"train\.tokens was altered"):
        READERS["training"](copied)


# A preparation that goes on


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def exhausted(path: Path) -> None:
    """A part file that says that the source was read to its end."""
    part = json.loads(path.read_text())
    part["position"] = {"file": 10**6, "record": 0, "offset": 0}
    path.write_text(json.dumps(part))


def of_next_part(path: Path) -> None:
    shutil.copy(path.parent.parent / "part-00002" / "part.json", path)


def gone(path: Path) -> None:
    shutil.rmtree(path.parent)


DAMAGE = {
    "tokens of zeros": ("train.tokens", zero, "train.tokens was altered"),
    "an index of zeros": ("train.documents", zero, "train.documents was altered"),
    "an altered position": ("part.json", exhausted, "part.json: was altered"),
    "the part file of another shard": ("part.json", of_next_part, "part.json belongs to shard 2"),
    "a missing shard": ("part.json", gone, "part-00001/part.json: is missing"),
    "a missing part file": ("part.json", Path.unlink, "part-00001/part.json: is missing"),
    "an empty part file": ("part.json", lambda path: path.write_bytes(b""), "part.json: is empty"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_preparation_does_not_resume_after_altered_shards(
    tmp_path: Path, text_folder: Path, sentencepiece_file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text_folder, sentencepiece_file)
    prepare(config, tmp_path / "whole")
    with interrupted_at(monkeypatch, shard=2), pytest.raises(Interrupted):
        prepare(config, tmp_path / "data")
    name, damage, said = DAMAGE[kind]
    damage(tmp_path / "data" / "part-00001" / name)
    before = contents(tmp_path / "data")
    with pytest.raises(InputError, match=said) as caught:
        prepare(config, tmp_path / "data")
    assert "delete part-00001 and every later part" in str(caught.value)
    assert contents(tmp_path / "data") == before
    for path in (tmp_path / "data").glob("part-0000[1-9]"):  # as the message says
        shutil.rmtree(path)
    prepare(config, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_preparation_does_not_resume_from_the_shards_of_another(
    tmp_path: Path, text_folder: Path, sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, held_out in (("data", 0.2), ("other", 0.5)):
        with interrupted_at(monkeypatch, shard=1), pytest.raises(Interrupted):
            prepare(small_config(text_folder, sentencepiece_file, held_out=held_out), tmp_path / name)
    shutil.rmtree(tmp_path / "data" / "part-00001")
    shutil.copytree(tmp_path / "other" / "part-00001", tmp_path / "data" / "part-00001")
    with pytest.raises(InputError, match="part-00001 belongs to another preparation"):
        prepare(small_config(text_folder, sentencepiece_file), tmp_path / "data")


def test_a_preparation_does_not_resume_with_an_altered_tokenizer(
    tmp_path: Path, text_folder: Path, sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text_folder, "train", vocab_size=500, sample_mb=0.05)
    with interrupted_at(monkeypatch, shard=1), pytest.raises(Interrupted):
        prepare(config, tmp_path / "data")
    shutil.copy(sentencepiece_file, tmp_path / "data" / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer\.model was altered"):
        prepare(config, tmp_path / "data")


def test_a_finished_folder_is_checked_before_it_is_called_prepared(
    copied: Path, text_folder: Path, sentencepiece_file: Path
) -> None:
    flipped(copied / "part-00001" / "train.tokens", 7)
    with pytest.raises(InputError, match=r"train\.tokens was altered"):
        prepare(small_config(text_folder, sentencepiece_file), copied)


def test_data_prepared_from_a_source_that_changed_is_not_trained_on(tmp_path: Path, sentencepiece_file: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(20):
        (tmp_path / "source" / f"{i}.txt").write_text(make_text(i, 200))
    config = DataConfig(path=str(tmp_path / "data"), prepare=small_config(tmp_path / "source", sentencepiece_file))
    arguments = {"split": "train", "batch_size": 2, "sequence_length": 16}
    open_data(config, **arguments)
    text = (tmp_path / "source" / "3.txt").read_text()
    (tmp_path / "source" / "3.txt").write_text(text.swapcase())
    with pytest.raises(InputError, match=r"was prepared from another source"):
        open_data(config, **arguments)
    shutil.rmtree(tmp_path / "source")  # only the tokens were brought here
    open_data(config, **arguments)


# A tokenizer of its own


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_stored_tokenizer_is_the_same_and_notices_changes(
    tmp_path: Path, sentencepiece_model: Tokenizer, kind: str
) -> None:
    tokenizer = load_tokenizer("bytes") if kind == "bytes" else sentencepiece_model
    folder = tmp_path / "tokenizer"
    save_tokenizer(tokenizer, folder)
    again = load_tokenizer(folder)
    text = make_text(3, 100)
    assert again.encode(text) == tokenizer.encode(text)
    names = ("fingerprint", "vocab_size", "bos_id", "eos_id", "entry_id")
    assert all(getattr(again, name) == getattr(tokenizer, name) for name in names)
    for path in folder.iterdir():
        flipped(path, 40)
        with pytest.raises(InputError, match=path.name):
            load_tokenizer(folder)
        flipped(path, 40)


def test_a_batch_of_fewer_examples_than_sources_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "other")
    config = DataConfig(mixture={str(prepared): 1.0, str(tmp_path / "other"): 1.0}, layout="documents")
    with pytest.raises(InputError, match=r"batch of 1 .* 2 sources"):
        open_data(config, split="train", batch_size=1, sequence_length=16)
    batch = open_data(config, split="train", batch_size=2, sequence_length=16)[0]
    assert batch.inputs.shape == (2, 16)
    assert batch.continues.dtype == np.bool_
    assert store.read_manifest(prepared).parts
