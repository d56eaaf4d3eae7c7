"""Files: whatever they are called or packed with, they are read as text or refused by name; nothing is lost unseen."""

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import tarfile
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.data.small import small_config
from tttlm.data import DatasetConfig, PrepareConfig, held_out_documents, load_tokenizer, pipeline, prepare, text_files
from tttlm.data.text_files import read_jsonl, read_parquet, read_text
from tttlm.errors import InputError

TEXT = b"some plain text\n"


def read(source: Path | str, folder: Path, **changes: object) -> list[str]:
    """Prepares a source as bytes; returns its documents."""
    prepare(small_config(source, "bytes", held_out=0.0, **changes), folder)
    decode = load_tokenizer("bytes").decode
    return [decode(document.tokens[1:-1].tolist()) for document in held_out_documents(folder, "train")]


def refused(source: Path | str, folder: Path, **changes: object) -> str:
    with pytest.raises(InputError) as caught:
        read(source, folder, **changes)
    assert "\n" not in str(caught.value)
    assert not (folder / "manifest.json").exists()
    return str(caught.value)


# What a file is packed with


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.GZ", "a.TXT.Gzip", "a.gz.txt", "a", "a.txt.xz", "a.zst"])
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress, zstandard.compress])
def test_a_compressed_file_is_decompressed_whatever_its_name(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(TEXT * 1_000))
    assert read(tmp_path / name, tmp_path / "data") == [TEXT.decode() * 1_000]


@pytest.mark.parametrize("name", ["a.jsonl.GZ", "a.JSONL.zstd", "a.ndjson.bz2", "a.json.XZ"])
def test_compressed_json_lines_are_read_however_the_name_is_spelled(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "td": zstandard.compress, "z2": bz2.compress, "xz": lzma.compress}[name.lower()[-2:]]
    (tmp_path / name).write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n'))
    assert read(tmp_path / name, tmp_path / "data") == ["one", "two"]


def tar(text: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    return out.getvalue()


def zipped(text: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", text)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.zip", zipped(TEXT), "is a ZIP archive"),
        ("a.txt", zipped(TEXT), "is a ZIP archive"),
        ("a.tar", tar(TEXT), "is a tar archive"),
        ("a.tgz", gzip.compress(tar(TEXT), mtime=0), "is a tar archive"),
        ("a.tar.zst", zstandard.compress(tar(TEXT)), "is a tar archive"),
        ("a.txt.gz", gzip.compress(gzip.compress(TEXT, mtime=0), mtime=0), "is packed twice"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c rest", "is a 7z archive"),
        ("a.lz4", b"\x04\x22\x4d\x18 rest", "is an LZ4 archive"),
        ("a.pdf", b"%PDF-1.7 text", "is a PDF"),
        ("a.png", b"\x89PNG\r\n\x1a\n rest", "is a PNG picture"),
        ("a.txt", b"PAR1 rest", "--format parquet"),
        ("a.bin", b"text and \0 bytes", "has bytes of value 0"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "has bytes of value 0"),
        ("a.txt", "text".encode("utf-32"), "UTF-16 or UTF-32"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "UTF-16"),
        ("a.txt.zst", b"no archive", "it is not Zstandard data"),
    ],
)
def test_files_that_are_not_text_are_refused_by_name_before_anything_is_written(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.txt").write_bytes(TEXT)
    (tmp_path / "source" / name).write_bytes(data)
    message = refused(tmp_path / "source", tmp_path / "data")
    assert name in message
    assert said in message
    assert not (tmp_path / "data").exists()


# Bounds


def bomb(path: Path, megabytes: int, unit: bytes) -> Path:
    packer = zstandard.ZstdCompressor().compressobj()
    block = unit * (1_000_000 // len(unit))
    path.write_bytes(b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush())
    return path


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_a_decompression_bomb_is_refused_in_bounded_time_and_memory(tmp_path: Path, name: str) -> None:
    unit = b"words and words\n" if name == "a.txt.zst" else b'{"text": "%s"}\n' % (b"words and words " * 1_000)
    path = bomb(tmp_path / name, 512, unit)
    assert path.stat().st_size < 100_000
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError, match=r"unpacks to more than 500 times its size"):
        for _ in read_text(path) if name == "a.txt.zst" else read_jsonl(path, path.name, "text", 0, 0):
            pass
    assert time.process_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_decompression_bomb_in_parquet_is_refused(tmp_path: Path) -> None:
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2_000, pyarrow.int32()), ["words " * 20_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(InputError, match="unpacks to more than 500 times its size"):
        for _ in read_parquet(tmp_path / "a.parquet", "a.parquet", "text", 0, 0):
            pass


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_highly_compressed_text_is_read_in_linear_time(tmp_path: Path, pack) -> None:
    text = "".join(f"line {i} of a log file that says nothing new\n" for i in range(60_000)).encode()
    (tmp_path / "log").write_bytes(pack(text))
    assert b"".join(read_text(tmp_path / "log")) == text


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_an_archive_of_several_parts_is_read_to_its_end_or_refused(tmp_path: Path, pack) -> None:
    """Python's readers of xz and bzip2 leave out a part whose first bytes are damaged."""
    path = tmp_path / "a"
    first, second = pack(b"one " * 50), pack(b"two " * 50)
    path.write_bytes(first + second)
    assert b"".join(read_text(path)) == b"one " * 50 + b"two " * 50
    for rest in (bytes([second[0] ^ 1]) + second[1:], b"no archive", second[:-1]):
        path.write_bytes(first + rest)
        with pytest.raises(InputError, match="cannot be read to its end"):
            b"".join(read_text(path))
    if pack is lzma.compress:  # the format has streams padded with zeros
        path.write_bytes(first + b"\0" * 8 + second + b"\0" * 4)
        assert b"".join(read_text(path)) == b"one " * 50 + b"two " * 50


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "' + b"y" * 5_000 + b'"}\n')
    assert "a.jsonl, line 2: is longer than 1,000 bytes" in refused(tmp_path / "a.jsonl", tmp_path / "data")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"text":['])
def test_json_that_nests_without_end_is_named_with_its_line(tmp_path: Path, opening: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + opening * 200_000 + b"\n")
    assert "a.jsonl, line 2: not a line of JSON" in refused(tmp_path / "a.jsonl", tmp_path / "data")


# Text


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_dropped(tmp_path: Path, pack) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(pack(bom + b'{"text": "one"}\r\n{"text": "two"}\r\n'))
    (tmp_path / "source" / "b.txt").write_bytes(pack(bom + b"Hello\r\n"))
    (tmp_path / "source" / "c.txt").write_bytes(pack(b"a mark inside " + bom + b"stays"))
    (tmp_path / "source" / "d.txt").write_bytes(pack(bom))
    expected = ["one", "two", "Hello\r\n", "a mark inside \ufeffstays"]
    assert read(tmp_path / "source", tmp_path / "data", shard_mb=1e-6) == expected


COLUMNS = {
    "string": pyarrow.array(["alpha", "βeta", None]),
    "large string": pyarrow.array(["alpha", "βeta", None], pyarrow.large_string()),
    "view": pyarrow.array(["alpha", "βeta", None], pyarrow.string_view()),
    "dictionary": pyarrow.array(["alpha", "βeta", None]).dictionary_encode(),
    "large dictionary": pyarrow.array(["alpha", "βeta", None], pyarrow.large_string()).dictionary_encode(),
    "binary": pyarrow.array([b"alpha", "βeta".encode(), None]),
    "binary view": pyarrow.array([b"alpha", "βeta".encode(), None], pyarrow.binary_view()),
    "fixed": pyarrow.array([b"alpha", "βeta".encode(), None], pyarrow.binary(5)),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_has_many_types_of_text(tmp_path: Path, kind: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": COLUMNS[kind]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", tmp_path / "data") == ["alpha", "βeta"]


def test_parquet_without_text_is_counted_and_other_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "source" / "a.parquet")
    (tmp_path / "source" / "b.txt").write_bytes(TEXT)
    assert read(tmp_path / "source", tmp_path / "data") == [TEXT.decode()]
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]["empty"] == 3
    for values in ([1, 2], [["a"]], [{"a": "b"}], [True]):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "c.parquet")
        assert "not text" in refused(tmp_path / "c.parquet", tmp_path / "other")


# Names, links, and skipped files


def test_a_file_name_may_be_invalid_utf8_or_have_several_lines(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"two\nlines.txt", b"\x1b[31mred.txt"):
        (folder / os.fsdecode(name)).write_bytes(TEXT + name)
    data = tmp_path / "data"
    read(folder, data)
    names = [document.name for document in held_out_documents(data, "train")]
    assert names == ["\\x1b[31mred.txt", "caf\\xe9.txt", "two\\nlines.txt"]
    (folder / os.fsdecode(b"broken\n\xe9.jsonl")).write_bytes(b"{")
    assert "broken\\n\\xe9.jsonl, line 1" in refused(folder, tmp_path / "other")


def test_links_to_folders_are_followed_and_cycles_end(tmp_path: Path) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "source" / "a.txt").write_bytes(b"a")
    (tmp_path / "elsewhere" / "b.txt").write_bytes(b"b")
    (tmp_path / "elsewhere" / "deep" / "c.txt").write_bytes(b"c")
    (tmp_path / "source" / "sub" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "sub" / "circle").symlink_to(tmp_path / "source")
    (tmp_path / "source" / "d.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "c.txt")
    for number, spec in enumerate(("source", "source/**/*.txt", "source/**", "sou*e/**/*.t?t")):
        assert sorted(read(tmp_path / spec, tmp_path / f"data{number}")) == ["a", "b", "c"], spec
    assert sorted(read(tmp_path / "source/sub/*/*.txt", tmp_path / "data4")) == ["a", "b", "c"]
    assert sorted(read(tmp_path / "source/*.txt", tmp_path / "data5")) == ["a", "c"]


def test_skipped_files_are_counted_and_named(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "source"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_bytes(b"x")
    (folder / ".hidden").write_bytes(b"x")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    (folder / "a.txt").write_bytes(TEXT)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "long.txt").write_bytes(TEXT * 100)
    (folder / "empty.txt").write_bytes(b"")
    assert read(folder, tmp_path / "data", max_file_bytes=1_000) == [TEXT.decode()]
    said = capsys.readouterr().err
    for line in (
        "skipped: 2 hidden files or folders (.git, .hidden)",
        "skipped: 2 broken links, pipes or devices (nowhere, pipe)",
        "skipped: 1 files that were named twice (again.txt)",
        "skipped: 1 files of more than 1,000 bytes (long.txt)",
        "skipped: 1 documents without text",
    ):
        assert line in said


def test_tokens_beside_their_text_do_not_become_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    for source, name in ((tmp_path, "one"), (tmp_path, "two"), (tmp_path / "**" / "*", "three")):
        assert read(source, tmp_path / name) == [TEXT.decode()]
    assert "1 folders of prepared tokens (one)" in capsys.readouterr().err
    read(tmp_path, tmp_path / "one")  # the same source as before, though other folders stand beside it


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    run = pipeline.Job.run

    def late(*arguments) -> None:
        (tmp_path / "a.txt").write_bytes(TEXT + TEXT)
        run(*arguments)

    monkeypatch.setattr(pipeline.Job, "run", late)
    assert "a.txt changed while it was read" in refused(tmp_path / "a.txt", tmp_path / "data")


def test_a_source_that_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", Path("/dev/zero")):
        assert "is not a regular file" in refused(source, tmp_path / "data")


def without_privileges() -> None:
    if os.getuid() == 0:  # root may read everything: become nobody
        os.setegid(65_534)
        os.seteuid(65_534)


@pytest.fixture
def nobody(tmp_path: Path):
    """Runs as somebody whom the permissions of a file concern."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    yield without_privileges
    if os.getuid() == 0:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("kind", ["file", "folder", "output", "tokenizer"])
def test_what_may_not_be_read_or_written_is_named(tmp_path: Path, kind: str, nobody) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "a.txt").write_bytes(TEXT)
    (tmp_path / "source" / "sub" / "b.txt").write_bytes(TEXT)
    (tmp_path / "output").mkdir()
    (tmp_path / "tok.model").write_bytes(b"x")
    forbidden = {
        "file": tmp_path / "source" / "a.txt",
        "folder": tmp_path / "source" / "sub",
        "output": tmp_path / "output",
        "tokenizer": tmp_path / "tok.model",
    }[kind]
    forbidden.chmod(0o555 if kind == "output" else 0o000)
    nobody()
    tokenizer = str(tmp_path / "tok.model") if kind == "tokenizer" else "bytes"
    with pytest.raises(InputError, match="Permission denied") as caught:
        prepare(PrepareConfig(source=(str(tmp_path / "source"),), tokenizer=tokenizer), tmp_path / "output" / "data")
    assert forbidden.name in str(caught.value)
    assert "\n" not in str(caught.value)


# Sources that change, datasets that break off, and a single file


def test_a_source_whose_content_changed_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"aaaa\n")
    read(path, tmp_path / "data")
    times = path.stat()
    path.write_bytes(b"bbbb\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match="started with another source"):
        read(path, tmp_path / "data")
    path.write_bytes(b"aaaa\n")  # as after another checkout: new times, the same content
    assert read(path, tmp_path / "data") == ["aaaa\n"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_whose_files_changed_is_another_source(tmp_path: Path, streaming: bool, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "old"}\n')
    dataset = DatasetConfig(name="json", data_files=(str(path),), streaming=streaming)
    config = small_config("", "bytes", source=(), dataset=dataset, held_out=0.0)
    prepare(config, tmp_path / "data")
    prepare(config, tmp_path / "data")
    path.write_bytes(b'{"text": "new"}\n')
    with pytest.raises(InputError, match=r"started with another source .then dataset json train, digest"):
        prepare(config, tmp_path / "data")


def test_a_dataset_that_fails_midway_is_named_with_its_record_and_resumes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "TASK_BYTES", 50)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"".join(b'{"text": "record %d"}\n' % i for i in range(200)))
    second.write_bytes(b'{"text": "good"}\n{"text": "bad \\ud83d surrogate"}\n')
    dataset = DatasetConfig(name="json", data_files=(str(first), str(second)))
    config = small_config("", "bytes", source=(), dataset=dataset, held_out=0.0, shard_mb=1e-4)
    said = r"dataset json, record \d+: cannot be read .*the same command resumes"
    with pytest.raises(InputError, match=said) as caught:
        prepare(config, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "data" / "part-00002").exists()


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path, sentencepiece_file: Path) -> None:
    lines = [f"line {i} of the only file there is\n" for i in range(1_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    config = small_config(tmp_path / "a.txt", sentencepiece_file, held_out=0.1, shard_mb=0.001)
    prepare(config, tmp_path / "data")
    decode = load_tokenizer(tmp_path / "data").decode
    (train,), (validation,) = (
        [decode(document.tokens[1:-1].tolist()) for document in held_out_documents(tmp_path / "data", split)]
        for split in ("train", "validation")
    )
    assert train + validation == "".join(lines)
    assert train.endswith("\n")
    assert 0.09 < len(validation) / len(train + validation) <= 0.1


def test_a_single_file_without_lines_is_divided_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("世界" * 1_000)
    prepare(small_config(tmp_path / "a.txt", "bytes", held_out=0.5), tmp_path / "data")
    texts = [
        bytes(document.tokens[1:-1].tolist()).decode()
        for split in ("train", "validation")
        for document in held_out_documents(tmp_path / "data", split)
    ]
    assert "".join(texts) == "世界" * 1_000
    assert len(texts) == 2
