"""The command line of prepare, as a person uses it: in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tttlm.cli.arguments import parse
from tttlm.cli.prepare import PrepareArguments, main
from tttlm.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            f"Chapter {i}. " + "It was the best of times, it was the worst of times. " * (i + 1)
        )
    return folder


def run(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tttlm.cli.prepare", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_prepare_then_check_then_inspect(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "data")
    made = run(books, "--output", data, "--vocab-size", "320", "--held-out", "0.2")
    assert made.returncode == 0, made.stderr
    assert "train:" in made.stderr
    assert "MB/s" in made.stderr
    main(["inspect", data, "--samples", "2"])
    seen = capsys.readouterr().out
    assert "320 ids, no BOS, EOS 2 at each document" in seen
    assert seen.count("It was the best of times") >= 3
    assert (tmp_path / "data" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    main(["--check", data])  # the picture is no part of the data
    assert "is intact" in capsys.readouterr().out


def test_check_names_what_was_altered(books: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    main([str(books), "--output", str(data), "--tokenizer", "bytes"])
    tokens = data / "part-00000" / "train.tokens"
    times = tokens.stat()
    changed = bytearray(tokens.read_bytes())
    changed[100] ^= 1
    tokens.write_bytes(changed)
    os.utime(tokens, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would leave it
    with pytest.raises(InputError, match=r"part-00000/train.tokens was altered"):
        main(["--check", str(data)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt", "--output", "data"], "no files under 'nowhere.txt'"),
        (["BOOKS"], "name the output folder"),
        (["--output", "data"], "nothing to prepare"),
        (["BOOKS", "--output", "data", "--tokeniser", "x"], "prepare: unknown flag '--tokeniser'"),
        (["BOOKS", "--output", "data", "--held-out", "lots"], "prepare:"),
        (["BOOKS", "--output", "data", "--vocab-size", "100000"], "ask for a smaller vocab_size"),
        (["--check", "nowhere"], "nowhere does not exist"),
        (["--check", "nowhere", "--output", "data"], "output = 'data' is not used with --check"),
        (["BOOKS", "--output", "data", "--dataset.split", "test"], "dataset.split = 'test' is not used without"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect"], "name a folder"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    books: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        main([str(books) if word == "BOOKS" else word for word in words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_person_sees_one_line_and_status_2(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere.txt", "--output", tmp_path / "data")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no files under")
    assert done.stderr.count("\n") == 1


def test_help_comes_without_loading_jax() -> None:
    code = "import sys; from tttlm.cli.prepare import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'jax' not in sys.modules and 'datasets' not in sys.modules"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--invalid" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "prepare").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations_can_be_used(path: Path, tmp_path: Path) -> None:
    given = parse(PrepareArguments, ["--config", str(path), "--output", "x"], prog="prepare")
    given.validate()
    assert f"--config configs/prepare/{path.name} --output" in path.read_text()  # as its first lines say
