"""The command lines as a person meets them: one run from text to score, and one line for what is wrong."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.started import start
from tests.training.small import write_texts
from tttlm.cli.arguments import parse, run_command
from tttlm.cli.train import main
from tttlm.training.config import CheckpointConfig
from tttlm.training.loop import Outcome

ROOT = Path(__file__).parents[2]
SMALL = """
data:
  path: {folder}/data
  prepare: {{source: [{folder}/texts], tokenizer: bytes, held_out: 0.25, workers: 1}}
model: {{vocab_size: 300, hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 16, remat: none}}
steps: {steps}
batch_size: 4
sequence_length: 32
evaluate: {{every: 5, batches: 2}}
checkpoint: {{every: 4}}
metrics: {{tensorboard: "off"}}
run: {folder}/run
"""


def command(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=ROOT
    )


def config_file(folder: Path, steps: int = 12) -> Path:
    write_texts(folder / "texts")
    path = folder / "small.yaml"
    path.write_text(SMALL.format(folder=folder, steps=steps))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("cli")
    return folder, command("train.py", "--config", config_file(folder))


def test_one_command_goes_from_text_to_a_score_a_curve_and_a_sample(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    for name in ("held-out text", "loss", "perplexity", "bits per byte", "gzip -9", "the model writes"):
        assert name in done.stdout
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "training: 100%" in done.stderr
    assert "tokens/s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_eval_scores_held_out_text_and_files_the_same_however_it_is_asked(trained, tmp_path):
    folder, done = trained
    printed = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("bits per byte"))
    held_out = command("eval.py", folder / "run", "--json")
    score = json.loads(held_out.stdout)["loss"][-1]
    assert f"{score['bits_per_byte']:.3f}" == printed
    text = tmp_path / "text.txt"
    text.write_text("the red cat sees the blue bird. " * 40)
    scores = [
        json.loads(command("eval.py", folder / "run", "--text", text, "--json", "--chunk", chunk).stdout)["loss"][0]
        for chunk in ("64", "2048")
    ]
    assert scores[0]["bytes"] == scores[0]["tokens"] == 1280
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)
    asked = ("--text", text, "--json", "--adapt.learning_rate", "0.1")
    static, dynamic = json.loads(command("eval.py", folder / "run", *asked).stdout)["loss"]
    assert static["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)
    assert dynamic["tokens"] == 1280
    assert dynamic["loss"] < static["loss"] - 0.2  # text that repeats itself is learned
    table = command("eval.py", folder / "run", "--text", text).stdout
    assert "bits per byte" in table
    assert text.name in table


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("train.py", ["--stps", "3"], "unknown flag '--stps' (did you mean '--steps'?)"),
        pytest.param(
            "train.py",
            ["--config", "no.yaml"],
            "no.yaml: cannot be read: No such file or directory",
            marks=pytest.mark.long,
        ),
        ("train.py", ["--data.path", "no/such/data"], "no/such/data"),
        pytest.param("eval.py", ["no/such/run"], "no/such/run is no folder", marks=pytest.mark.long),
        ("eval.py", [".", "--text", "no.txt"], "no files under 'no.txt'"),
        pytest.param("eval.py", [], "name the folder of a run", marks=pytest.mark.long),
    ],
)
def test_bad_input_is_one_line_and_status_2(name, arguments, says):
    done = command(name, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help_names_every_field_with_its_default():
    done = command("train.py", "--help")
    assert done.returncode == 0
    for flag in ("--model.hidden_size", "--optimizer.learning_rate", "--data.prepare.vocab_size", "--faults.policy"):
        assert flag in done.stdout


@pytest.mark.parametrize("name", ["convert", "eval", "generate", "plot", "prepare", "shift"])
def test_examples_in_help_are_lines_of_their_own(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"tttlm.cli.{name}").main(["--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if "python " in line]
    assert len(examples) > 1
    assert all(line.count("python ") == 1 for line in examples)


def test_the_description_of_a_field_in_help_is_one_paragraph(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        parse(CheckpointConfig, ["--help"], prog="")
    assert "on a full disk for instance: stop, or continue without it. Earlier" in capsys.readouterr().out


@pytest.mark.long
def test_every_command_runs_as_a_module():
    commands = [path for path in (ROOT / "tttlm" / "cli").glob("*.py") if "\ndef run() -> None:" in path.read_text()]
    assert len(commands) >= 9
    assert all('if __name__ == "__main__":\n    run()' in path.read_text() for path in commands)


def test_sigterm_saves_and_leaves_with_its_own_status(tmp_path):
    file = config_file(tmp_path, steps=100_000)
    process = start("train", "--config", file, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - sent < 15
    assert process.returncode == 75, said
    assert "saved at step" in said
    assert any(name.isdigit() for name in os.listdir(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("name", ["tttlm.evaluation.run.load_run", "tttlm.cli.train.print_score"])
def test_sigterm_while_a_finished_run_is_reported_leaves_it_finished(name, monkeypatch, capsys):
    monkeypatch.setattr("tttlm.evaluation.run.load_run", lambda path: None)
    monkeypatch.setattr(name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("tttlm.training.loop.train", lambda config: Outcome("finished", 4, 0, "finished 4 steps", 1.0))
    monkeypatch.setattr("tttlm.training.cluster.join", lambda config: None)
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda: main(["--data.path", "data"]))
    said = capsys.readouterr().err
    assert leaving.value.code == 0, said
    assert "stopped by SIGTERM; the run is finished" in said
