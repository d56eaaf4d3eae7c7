"""Preparing: the tokens on disk are those of the text, whatever it came in, however often it was interrupted."""

import gzip
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.small import contents, make_text, sentencepiece_of, small_config
from tttlm.data import (
    DatasetConfig,
    PrepareConfig,
    cutting,
    load_tokenizer,
    pipeline,
    preparation,
    prepare,
    sources,
    store,
    writing,
)
from tttlm.data.pipeline import held_out
from tttlm.data.raw_document import keyed
from tttlm.data.tokenizer import SentencePieceTokenizer
from tttlm.errors import InputError

ROOT = Path(__file__).parents[2]


def stored(folder: Path) -> dict[str, list[list[int]]]:
    """The documents of each split as lists of tokens."""
    found = {}
    for name in store.SPLITS:
        split = store.Split(folder, name)
        stops = np.cumsum(split.index()["tokens"]).astype(int).tolist()
        found[name] = [split.read(a, b).tolist() for a, b in pairwise([0, *stops])]
    return found


def expected(texts: list[str], tokenizer: SentencePieceTokenizer, share: float = 0.2) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {name: [] for name in store.SPLITS}
    for text in texts:
        side = "validation" if held_out(keyed([text.encode()])[0], share) else "train"
        found[side].append([*tokenizer.encode(text), tokenizer.eos_id])
    return found


def write_text(folder: Path, texts: list[str]) -> tuple[str, ...]:
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return (str(folder),)


def write_packed_text(folder: Path, texts: list[str]) -> tuple[str, ...]:
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return (str(folder / "*.gz"),)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_jsonl(folder: Path, texts: list[str]) -> tuple[str, ...]:
    (folder / "a.jsonl").write_bytes(json_lines(texts[:25]) + b"\n")  # with a blank line
    (folder / "b.jsonl").write_bytes(json_lines(texts[25:]).rstrip(b"\n"))
    return (str(folder / "*.jsonl"),)


def write_jsonl_gz(folder: Path, texts: list[str]) -> tuple[str, ...]:
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    return (str(folder / "all.jsonl.gz"),)


def write_jsonl_xz(folder: Path, texts: list[str]) -> tuple[str, ...]:
    (folder / "all.json.xz").write_bytes(lzma.compress(json_lines(texts)))
    return (str(folder),)


def write_jsonl_zst(folder: Path, texts: list[str]) -> tuple[str, ...]:
    zstandard = pytest.importorskip("zstandard")
    packed = [zstandard.compress(json_lines(part)) for part in (texts[:30], texts[30:])]  # two frames, as `cat` makes
    (folder / "all.jsonl.zst").write_bytes(b"".join(packed))
    return (str(folder),)


def write_parquet(folder: Path, texts: list[str]) -> tuple[str, ...]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=7)
    return (str(folder),)


WRITERS = [write_text, write_packed_text, write_jsonl, write_jsonl_gz, write_jsonl_xz, write_jsonl_zst, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_tokens_of_its_texts(
    tmp_path, texts, sentencepiece_model, sentencepiece_file, write
):
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source", texts)
    prepare(small_config("", sentencepiece_file, source=source), tmp_path / "data")
    assert stored(tmp_path / "data") == expected(texts, sentencepiece_model)
    assert store.count_parts(tmp_path / "data") > 3


def test_a_document_written_in_blocks_has_the_tokens_of_the_whole(tmp_path, texts, monkeypatch):
    """With a tokenizer that puts a space in front of every text it is given."""
    model = sentencepiece_of("bpe", "identity", prefix=True, trim=False)
    (tmp_path / "small.model").write_bytes(model.file_bytes)
    (tmp_path / "source").mkdir()
    write_text(tmp_path / "source", texts)
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 200)
    prepare(small_config(tmp_path / "source", tmp_path / "small.model", held_out=0.0), tmp_path / "data")
    assert stored(tmp_path / "data")["train"] == [[*model._model.encode(text), model.eos_id] for text in texts]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_dataset_gives_the_tokens_of_its_texts(
    tmp_path, texts, sentencepiece_model, sentencepiece_file, kind, streaming, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    files = (write_jsonl if kind == "json" else write_parquet)(tmp_path / "source", texts)
    files = (f"{files[0]}/*",) if kind == "parquet" else files
    dataset = DatasetConfig(name=kind, data_files=files, streaming=streaming)
    config = small_config("", sentencepiece_file, source=(), dataset=dataset)
    with interrupted_at(monkeypatch, shard=2), pytest.raises(Interrupted):
        prepare(config, tmp_path / "data")
    prepare(config, tmp_path / "data")
    assert stored(tmp_path / "data") == expected(texts, sentencepiece_model)


class Interrupted(BaseException):
    """Stands for the end of the process."""


class interrupted_at:
    """Ends `prepare` as a kill would, when a shard has just been put in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
        self.monkeypatch, self.shard = monkeypatch, shard

    def __enter__(self) -> None:
        self.context = self.monkeypatch.context()
        patch = self.context.__enter__()
        commit = writing.PartWriter.commit

        def then_stop(writer, *facts):
            part = commit(writer, *facts)
            if writer.final.name == store.part_name(self.shard):
                raise Interrupted
            return part

        patch.setattr(writing.PartWriter, "commit", then_stop)

    def __exit__(self, *exception) -> None:
        self.context.__exit__(*exception)


@pytest.mark.parametrize("write", WRITERS)
def test_an_interruption_does_not_change_the_result(tmp_path, texts, sentencepiece_file, write, monkeypatch):
    (tmp_path / "source").mkdir()
    config = small_config("", sentencepiece_file, source=write(tmp_path / "source", [*texts, "", *texts[:3]]))
    prepare(config, tmp_path / "whole")
    for shard in range(0, 6, 2):
        with interrupted_at(monkeypatch, shard), pytest.raises(Interrupted):
            prepare(config, tmp_path / "data")
    prepare(config, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_dying_at_any_write_does_not_change_the_result(tmp_path, text_folder, sentencepiece_file, monkeypatch):
    config = small_config(text_folder, "train", vocab_size=500, sample_mb=0.05, shard_mb=0.03)
    writes = 0

    def count(handle: int) -> None:
        nonlocal writes
        writes += 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        prepare(config, tmp_path / "whole")
    assert writes > 20
    for last in range(writes):
        with monkeypatch.context() as patch:
            calls = iter(range(writes))

            def fsync(handle: int, calls=calls, last=last) -> None:
                if next(calls) == last:
                    raise Interrupted

            patch.setattr(os, "fsync", fsync)
            patch.setattr(writing.PartWriter, "discard", lambda writer: None)  # a dead process tidies nothing up
            with pytest.raises(Interrupted):
                prepare(config, tmp_path / str(last))
        prepare(config, tmp_path / str(last))
        assert contents(tmp_path / str(last)) == contents(tmp_path / "whole")


def command(config: PrepareConfig, folder: Path, before: str = "") -> list[str]:
    """A Python process that prepares; small tasks, so that little text keeps several workers busy."""
    code = f"""
from tttlm.data import pipeline, preparation
from tttlm.data import DatasetConfig, PrepareConfig
from tttlm.cli.arguments import run_command
pipeline.TASK_BYTES = preparation.TASK_BYTES = 2000
{before}
run_command(lambda: preparation.prepare({config!r}, {str(folder)!r}))
"""
    return [sys.executable, "-c", code]


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, texts, sentencepiece_file):
    source = tmp_path / "all.jsonl"
    source.write_bytes(json_lines([text for i in range(8) for text in (*texts, make_text(i, 3_000))]))
    config = small_config(source, sentencepiece_file, shard_mb=0.03)
    prepare(config, tmp_path / "whole")
    rng, kills = random.Random(0), 0
    folder = tmp_path / "data"
    # A slow disk: on a fast machine all would be written before the third kill.
    slow = "import os, time; sync = os.fsync; os.fsync = lambda handle: (time.sleep(0.01), sync(handle))"
    while not (folder / store.MANIFEST).exists():
        done = store.count_parts(folder)
        config = replace(config, workers=1 if kills else 2)
        process = subprocess.Popen(command(config, folder, slow), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and store.count_parts(folder) < done + 3:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        workers = children(process.pid)
        if process.poll() is None:
            process.kill()
            kills += 1
            wait_for(lambda workers=workers: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 3
    assert contents(folder) == contents(tmp_path / "whole")


def children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "still not so"
        time.sleep(0.02)


def test_the_number_of_processes_does_not_change_the_result(tmp_path, text_folder, sentencepiece_file, monkeypatch):
    monkeypatch.setattr(pipeline, "TASK_BYTES", 3_000)
    monkeypatch.setattr(preparation, "TASK_BYTES", 3_000)
    for workers in (1, 3):
        prepare(small_config(text_folder, sentencepiece_file, workers=workers), tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_full_disk_is_reported_in_one_line_and_nothing_is_lost(tmp_path, text_folder, sentencepiece_file):
    config = small_config(text_folder, sentencepiece_file)
    prepare(config, tmp_path / "whole")
    folder = tmp_path / "data"
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    largest = max(path.stat().st_size for path in (tmp_path / "whole").glob("*/train.tokens"))
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, {largest - 1}))"
    full = subprocess.run(command(config, folder, limit), cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no space left for")
    assert "run the same command again" in last
    assert "Traceback" not in full.stderr
    assert not list(folder.glob(".part*"))
    prepare(config, folder)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_a_document(tmp_path):
    """80 MB in one document, tokens of twice that size, in the memory that 20 MB take."""
    lines = make_text(1, 4_000).encode()
    report = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    peaks = []
    for megabytes in (20, 80):
        with open(tmp_path / "text", "wb") as file:
            for _ in range(megabytes * 10**6 // len(lines)):
                file.write(lines)
        config = small_config(tmp_path / "text", "bytes", held_out=0.0)
        done = subprocess.run(
            command(config, tmp_path / f"{megabytes}", report), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) / 1024)
    assert peaks[1] - peaks[0] < 10, f"MiB at the peak: {peaks}"


# What documents are held out


def test_a_document_stays_in_its_split_when_others_are_added(tmp_path, texts, sentencepiece_file):
    sides = []
    for count in (30, 60):
        source = tmp_path / f"{count}.jsonl"
        source.write_bytes(json_lines(random.Random(count).sample(texts[:30], 30) + texts[30:count]))
        prepare(small_config(source, sentencepiece_file), tmp_path / str(count))
        sides.append({tuple(t): name for name, found in stored(tmp_path / str(count)).items() for t in found})
    assert sides[0].items() <= sides[1].items()


def test_the_same_content_is_never_in_both_splits(tmp_path, texts, sentencepiece_file):
    (tmp_path / "source").mkdir()
    write_text(tmp_path / "source", texts)
    (tmp_path / "source" / "all.jsonl").write_bytes(json_lines(texts))
    prepare(small_config(tmp_path / "source", sentencepiece_file), tmp_path / "data")
    found = stored(tmp_path / "data")
    train, validation = ({tuple(t) for t in found[name]} for name in store.SPLITS)
    assert train.isdisjoint(validation)
    assert len(found["train"]) + len(found["validation"]) == 120


def test_a_smaller_held_out_fraction_is_part_of_a_larger_one(texts):
    keys = [keyed([text.encode()])[0] for text in texts]
    small, large = ({key for key in keys if held_out(key, share)} for share in (0.1, 0.5))
    assert small < large
    assert 15 < len(large) < 45


def test_a_tokenizer_is_trained_on_training_documents_alone(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    texts = [make_text(i, 200) + f" unique{i}" for i in range(40)]
    write_text(tmp_path / "source", texts)
    seen = []
    train = preparation.train_tokenizer
    monkeypatch.setattr(
        preparation, "train_tokenizer", lambda sample, size: (seen.extend(sample), train(sample, size))[1]
    )
    prepare(small_config(tmp_path / "source", "train", vocab_size=500, sample_mb=10.0, held_out=0.5), tmp_path / "data")
    held = [text for text in texts if held_out(keyed([text.encode()])[0], 0.5)]
    assert 5 < len(held) < 35
    assert sorted(seen) == sorted(set(texts) - set(held))


# Input that is not plain


@pytest.fixture
def with_damage(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"plain text here\n")
    (folder / "b.txt").write_bytes(b"first quite plain, " * 100 + b"then caf\xe9 in Latin-1 " * 100)
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.txt").write_bytes(b"more plain text")
    return folder


@pytest.mark.parametrize(("policy", "documents"), [("replace", 3), ("skip", 2)])
def test_invalid_utf8_is_replaced_or_skipped_and_counted(tmp_path, with_damage, policy, documents, capsys, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 200)  # so that it comes up when much of the document is written
    prepare(small_config(with_damage, "bytes", invalid_utf8=policy, held_out=0.0), tmp_path / "data")
    manifest = store.read_manifest(tmp_path / "data")
    assert manifest.counts == store.Counts(1, 1)
    found = stored(tmp_path / "data")["train"]
    assert len(found) == documents == manifest.splits["train"].documents
    tokenizer = load_tokenizer("bytes")
    texts = [tokenizer.decode(tokens) for tokens in found]
    assert texts[0] == "plain text here\n"
    assert texts[-1] == "more plain text"
    assert ("caf\ufffd in Latin-1 " in texts[1]) == (policy == "replace")
    assert "1 documents" in capsys.readouterr().err


def test_invalid_utf8_can_stop_everything_and_is_named(tmp_path, with_damage):
    with pytest.raises(InputError, match=r"b\.txt is not valid UTF-8"):
        prepare(small_config(with_damage, "bytes", invalid_utf8="fail"), tmp_path / "data")
    assert not (tmp_path / "data" / store.MANIFEST).exists()


def test_bytes_that_json_and_parquet_call_text_but_are_not_are_counted(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "half a pair \\ud83d"}\n{"text": null}\n'
    )
    column = pyarrow.array([b"caf\xe9", b"fine"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "source" / "b.parquet")
    prepare(small_config(tmp_path / "source", "bytes", held_out=0.0), tmp_path / "data")
    manifest = store.read_manifest(tmp_path / "data")
    assert manifest.counts == store.Counts(1, 3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: no column 'text'; there are: body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"line 2: column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "trunc', r"line 2: not a line of JSON"),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', r"line 1: not a line of JSON \(it has the key 'text' twice\)"),
        ("a.json", b'[{"text": "x"}]\n', "JSON array|list"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "xyz"}\n' * 999, mtime=0)[:-20], "cannot be read to its end"),
        ("a.txt.gz", b"not gzip at all", "cannot be read to its end"),
        ("a.txt.xz", lzma.compress(b"text " * 9999)[:-30], "cannot be read to its end"),
        ("a.parquet", b"PAR1 but not really PAR1", "cannot be read to its end"),
        ("a.txt", b"", r"nothing to prepare: a\.txt is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "nothing was prepared"),
    ],
    # A test's name may not hold what changes from process to process: workers compare the names.
    ids=[
        "column missing",
        "column of numbers",
        "line cut short",
        "two texts in a line",
        "JSON array",
        "gzip cut short",
        "no gzip",
        "xz cut short",
        "no Parquet",
        "empty",
        "gzip of nothing",
    ],
)
def test_a_source_that_cannot_be_used_is_named_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        prepare(small_config(tmp_path / name, "bytes"), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / store.MANIFEST).exists()


def test_a_truncated_zst_file_is_noticed(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(random.Random(0).randbytes(300_000).hex().encode())
    (tmp_path / "a.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="cannot be read to its end"):
        prepare(small_config(tmp_path / "a.txt.zst", "bytes"), tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": ("nowhere/*.txt",)}, "no files under 'nowhere"),
        ({"source": ()}, "nothing to prepare"),
        ({"source": ("",)}, "an empty name among the sources"),
        ({"source": (), "dataset": DatasetConfig(name="json")}, "'json' is a format: name its files"),
        ({"source": ("stdlib", "more")}, "cannot be combined"),
        ({"held_out": 1.5}, "'held_out' must be at most 1, got 1.5"),
        ({"tokenizer": "absent.model"}, "does not exist"),
        ({"bos": True, "tokenizer": "json"}, "names no BOS"),
        ({"dataset": DatasetConfig(name="json")}, "name one of them"),
        ({"source": (), "dataset": DatasetConfig(name="json", data_files=("/nowhere/x.jsonl",))}, "cannot be loaded"),
    ],
)
def test_a_contradictory_configuration_is_refused_before_anything_is_written(
    tmp_path, text_folder, changes, said, monkeypatch
):
    if changes.get("tokenizer") == "json":
        tokenizers = pytest.importorskip("tokenizers")
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
        changes = {**changes, "tokenizer": str(tmp_path / "tokenizer.json")}
    with pytest.raises(InputError, match=said):
        prepare(small_config(text_folder, "bytes", **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


# The folder


def test_two_prepares_into_one_folder(tmp_path, text_folder, sentencepiece_file):
    config = small_config(text_folder, sentencepiece_file)
    with writing.locked(tmp_path / "data"), pytest.raises(InputError, match="being prepared by another process"):
        prepare(config, tmp_path / "data")
    prepare(config, tmp_path / "data")


def test_preparing_again_does_nothing(tmp_path, text_folder, sentencepiece_file, capsys):
    prepare(small_config(text_folder, sentencepiece_file), tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    prepare(small_config(text_folder, sentencepiece_file, workers=2), tmp_path / "data")
    assert "already prepared" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}


def test_a_folder_made_from_something_else_is_refused_and_left_alone(tmp_path, text_folder, sentencepiece_file, texts):
    prepare(small_config(text_folder, sentencepiece_file), tmp_path / "data")
    before = contents(tmp_path / "data")
    (tmp_path / "more").mkdir()
    write_text(tmp_path / "more", [*texts, "one more"])
    for config, said in (
        (small_config(text_folder, sentencepiece_file, held_out=0.3), "held_out .then 0.2, now 0.3"),
        (small_config(text_folder, "bytes"), "another tokenizer"),
        (small_config(tmp_path / "more", sentencepiece_file), "then 60 files of .* now 61 files"),
    ):
        with pytest.raises(InputError, match=said):
            prepare(config, tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_a_folder_without_a_finished_shard_may_be_started_again(tmp_path, text_folder, sentencepiece_file):
    with pytest.raises(InputError, match=r"at most .* smaller vocab_size"):
        prepare(small_config(text_folder, "train", vocab_size=50_000), tmp_path / "data")
    prepare(small_config(text_folder, "train", vocab_size=400), tmp_path / "data")
    assert store.read_manifest(tmp_path / "data").tokenizer.vocab_size == 400


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, text_folder, sentencepiece_file):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"has other files \(thesis.tex\)"):
        prepare(small_config(text_folder, sentencepiece_file), tmp_path / "data")
    assert contents(tmp_path / "data") == {"thesis.tex": b"years of work"}


def test_bos_and_eos_are_stored_as_asked_and_recorded(
    tmp_path, text_folder, texts, sentencepiece_file, sentencepiece_model
):
    for bos, eos in ((True, True), (True, False), (False, False)):
        folder = tmp_path / f"{bos}{eos}"
        prepare(small_config(text_folder, sentencepiece_file, bos=bos, eos=eos, held_out=0.0), folder)
        front, back = [sentencepiece_model.bos_id] * bos, [sentencepiece_model.eos_id] * eos
        assert stored(folder)["train"] == [front + sentencepiece_model.encode(text) + back for text in texts]
        manifest = store.read_manifest(folder)
        assert (manifest.bos, manifest.eos, manifest.tokenizer.eos_id) == (bos, eos, 2)


def test_ids_take_two_bytes_or_four(tmp_path, text_folder, sentencepiece_file, monkeypatch):
    prepare(small_config(text_folder, sentencepiece_file), tmp_path / "two")
    load = SentencePieceTokenizer.__init__

    def with_more_ids(tokenizer, model: bytes) -> None:
        load(tokenizer, model)
        tokenizer.vocab_size = 65_537

    monkeypatch.setattr(SentencePieceTokenizer, "__init__", with_more_ids)
    prepare(small_config(text_folder, sentencepiece_file), tmp_path / "four")
    assert store.read_manifest(tmp_path / "two").dtype == "uint16"
    assert store.read_manifest(tmp_path / "four").dtype == "uint32"
    assert stored(tmp_path / "two") == stored(tmp_path / "four")


def test_the_standard_library_is_a_source_without_installed_packages():
    source = sources.open_source(PrepareConfig(source="stdlib"))
    names = set(source.names)
    assert {"abc.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)
    assert max(file.size for file in source.files) <= 750_000
