"""One command compares models; killed in the middle it goes on, and what cannot be compared is one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.started import start
from tests.training.small import write_texts
from tttlm.cli.compare import main, read_comparison
from tttlm.comparison.text import held_out_fraction
from tttlm.data import PrepareConfig, held_out_documents, prepare
from tttlm.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = """
output: {folder}/out
seeds: [0, 1]
match: {{by: parameters, to: attention, vary: [intermediate_size], tolerance: 0.05}}
positions: {{length: 64, stretches: 2, documents: 4, batch_size: 4}}
train:
  data: {{prepare: {{tokenizer: bytes, held_out: 0.25, workers: 1}}}}
  model: {{vocab_size: 300, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16, remat: none}}
  steps: 6
  batch_size: 4
  sequence_length: 32
  evaluate: {{every: 3, batches: 1}}
  checkpoint: {{every: 3}}
  metrics: {{tensorboard: "off"}}
models:
  attention: {{model: {{mixers: [attention]}}}}
  window: {{model: {{mixers: [sliding_attention], intermediate_size: 40, attention: {{sliding_window: 4}}}}}}
"""


def arguments(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "tttlm.cli.compare", *map(str, words)]


def compare(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(*words), capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """A comparison that was killed when its first run was finished, and started again."""
    folder = tmp_path_factory.mktemp("compare")
    write_texts(folder / "texts")
    write_texts(folder / "test", 3)
    (folder / "small.yaml").write_text(SMALL.format(folder=folder))
    words = (folder / "small.yaml", "--data", folder / "texts", "--test", folder / "test")
    second = folder / "out" / "runs" / "window-0"
    process = start("compare", *words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not second.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (folder / "out" / "runs" / "attention-0" / "checkpoints" / "6").stat().st_mtime_ns
    return folder, compare(*words), first


@pytest.mark.long
def test_killed_in_the_middle_it_goes_on_and_repeats_nothing(compared):
    folder, done, first = compared
    assert done.returncode == 0, done.stderr
    assert "attention, seed 0" not in done.stderr.split("scoring")[0]
    assert (folder / "out" / "runs" / "attention-0" / "checkpoints" / "6").stat().st_mtime_ns == first
    for name in ("attention", "window"):
        assert "[" in done.stderr
        assert f"{name}, seed 1" in done.stderr
    again = compare(folder / "small.yaml", "--data", folder / "texts", "--test", folder / "test")
    assert again.returncode == 0
    assert "training" not in again.stderr
    assert "scoring" not in again.stderr


@pytest.mark.long
def test_the_report_holds_what_was_measured(compared):
    folder, done, _ = compared
    report = folder / "out" / "report"
    *table, last = done.stdout.strip().splitlines()
    assert last == str(report / "report.md")
    assert "\n".join(table).strip() in (report / "report.md").read_text()
    for picture in ("curves.png", "positions.png"):
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in (report / "report.md").read_text()
    values = json.loads((report / "report.json").read_text())
    attention, window = values["models"]
    assert attention["difference"] is None
    assert window["shape"]["changed"].startswith("intermediate_size 40 -> ")
    assert window["parameters"] == pytest.approx(attention["parameters"], rel=0.05)
    # The loss again, from the scores of the runs: the mean over documents and seeds of the first 32 positions.
    losses = {}
    for model in values["models"]:
        scores = [
            json.loads((folder / "out" / "runs" / f"{model['name']}-{seed}" / "scores.json").read_text())
            for seed in (0, 1)
        ]
        assert [len(score["documents"]) for score in scores] == [3, 3]
        within = scores[0]["bins"].index(32)
        by_document = np.mean(
            [np.sum(np.array(s["nats"])[:, :within], 1) / np.sum(np.array(s["tokens"])[:, :within], 1) for s in scores],
            axis=0,
        )
        losses[model["name"]] = by_document
        assert model["loss"]["mean"] == pytest.approx(by_document.mean())
        assert model["training"]["tokens"] == 6 * 4 * 32
        assert model["training"]["flops"] == pytest.approx(3 * 6 * 4 * 32 * model["flops_per_token"])
        assert [len(curve["loss"]) for curve in model["held_out"]] == [2, 2]
        assert model["peak_memory"] > model["step_memory"] > 12 * model["parameters"]
        assert f"| {model['name']} | {model['loss']['mean']:.4f} ± " in (report / "report.md").read_text()
    assert window["difference"]["mean"] == pytest.approx((losses["window"] - losses["attention"]).mean())


@pytest.mark.long
def test_finished_runs_are_taken_as_they_are(compared):
    folder, _, _ = compared
    runs = folder / "out" / "runs"
    file = folder / "finished.yaml"
    file.write_text(
        f"output: {folder}/finished\npositions: {{length: 64, stretches: 2}}\nmodels:\n"
        f"  a: {{run: [{runs}/attention-0, {runs}/attention-1]}}\n  b: {{run: {runs}/window-0}}\n"
    )
    done = compare(file)
    assert done.returncode == 0, done.stderr
    assert "finished run" in done.stderr
    assert "training" not in done.stderr
    models = json.loads((folder / "finished" / "report" / "report.json").read_text())["models"]
    assert [model["seeds"] for model in models] == [[0, 1], [0]]


@pytest.mark.long
def test_another_configuration_in_the_same_folder_is_refused(compared, monkeypatch):
    folder, _, _ = compared
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = [str(folder / "small.yaml"), "--data", str(folder / "texts"), "--train.optimizer.learning_rate", "1e-2"]
    with pytest.raises(
        InputError, match=r"optimizer\.learning_rate: 0\.003 -> 0\.01.*choose another --output"
    ) as error:
        main(words)
    assert "\n" not in str(error.value)


BAD = {
    "unknown model": (["--models.mambo.steps", "3"], "unknown model 'mambo' in '--models.mambo.steps'"),
    "unknown name": (["--train.stps", "3"], "unknown flag '--stps' (did you mean '--steps'?)"),
    "other batches": (["--models.window.batch_size", "8"], "read the same batches, but batch_size is 4 for attention"),
    "match to": (["--match.to", "mamba"], "match.to names one of the models (attention, window), got 'mamba'"),
    "no match": (
        ["--match.vary", "num_layers", "--models.window.model.intermediate_size", "64"],
        "raise match.tolerance or name more fields in match.vary",
    ),
    "unknown part": (["--models.window.model.widht", "8"], "unknown flag '--model.widht'"),
    "rate twice": (["--sweep.learning_rates", "1e-3", "0.001"], "names 0.001 twice"),
    "answers": (["--answers.samples", "3"], "answers.samples = 3 is not used without train.data.generated"),
    "seeds": (["--seeds", "1", "1"], "seeds must be different numbers"),
    "nothing to read": ([], "name the text to train on: --data FOLDER"),
    "no text": (["--data", "no/such/folder"], "no/such/folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_compared_is_one_line(what, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as the command sets it; put back afterwards
    (tmp_path / "small.yaml").write_text(SMALL.format(folder=tmp_path))
    words, says = BAD[what]
    with pytest.raises(InputError, match=re.escape(says)) as error:
        main([str(tmp_path / "small.yaml"), *words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "expected 'key: value' lines, got [1]"),
        ("models: [a]", "'models' is a section with keys, got ['a']"),
        ("models: {a: 3}", "models.a: expected 'key: value' lines, got 3"),
        ("models: {a: {run: 3}}", "models.a: 'run' names a finished run or a list of them, got 3"),
        ("models: {a: {run: []}}", "models.a: 'run' names a finished run or a list of them, got []"),
        ("models: {a: {base: {}}}", "models.a: 'base' names another YAML file or a list of them, got {}"),
        ("models: {a: {base: x.yaml}}", "x.yaml: is its own base, through x.yaml"),
        ("base: x.yaml", "x.yaml: is its own base, through x.yaml"),
        ("train: {steps: [1]}\nmodels: {a: {}}", "train: 'steps': an integer was expected, got [1]"),
        ("train: 3\nmodels: {a: {}}", "train: expected 'key: value' lines, got 3"),
        ("seeds: 3\nmodels: {a: {}}", "'seeds': a list was expected, got 3"),
        ("seeds: [-1]\nmodels: {a: {}}", "'seeds[0]' must be at least 0, got -1"),
        ("match: {tolerance: .nan}\nmodels: {a: {}}", "'match.tolerance' must be a finite number, got nan"),
        ("models: {a: {}, a: {}}", "line 1: the key 'a' is a duplicate"),
        ("models:", "there is no model to compare"),
        ("models: {../a: {}}", "names of models have letters, digits"),
    ],
)
def test_a_file_of_the_wrong_shape_is_one_line(text, says, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        main([str(tmp_path / "x.yaml"), "--output", str(tmp_path / "out"), "--data", "no/such/folder"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_base_of_a_comparison_gives_it_models(tmp_path):
    (tmp_path / "base.yaml").write_text("seeds: [5]\ntrain: {steps: 3}\nmodels: {a: {seed: 1}, b: {}}\n")
    (tmp_path / "x.yaml").write_text("base: base.yaml\nmodels: {b: {seed: 2, run: [r]}, c: }\n")
    config, models, given, order = read_comparison([str(tmp_path / "x.yaml"), "--train.batch_size", "2"])
    assert order == ["a", "b", "c"]
    assert not given
    assert config.seeds == (5,)
    assert [(model.steps, model.batch_size) for model in models.values()] == [(3, 2)] * 3
    assert [model.seed for model in models.values()] == [1, 2, 0]


def test_without_a_file_it_says_what_to_type():
    done = compare()
    assert done.returncode == 2
    assert done.stderr.startswith("error: name a configuration, for example: python -m tttlm.cli.compare")
    assert done.stderr.count("\n") == 1


def test_one_document_is_not_enough_and_two_are(tmp_path):
    for count in (1, 2, 3):
        texts = write_texts(tmp_path / f"texts{count}", count)
        settings = PrepareConfig(source=(str(texts),), tokenizer="bytes", held_out=1e-9, workers=1)
        if count == 1:
            with pytest.raises(InputError, match=r"has 1 document: .* it needs two"):
                held_out_fraction(settings)
            continue
        settings = PrepareConfig(
            source=(str(texts),), tokenizer="bytes", held_out=held_out_fraction(settings), workers=1
        )
        prepare(settings, tmp_path / f"data{count}")
        assert len(list(held_out_documents(tmp_path / f"data{count}"))) == 1


@pytest.mark.long
def test_ctrl_c_leaves_with_a_status_and_saves(tmp_path):
    write_texts(tmp_path / "texts")
    (tmp_path / "small.yaml").write_text(SMALL.format(folder=tmp_path))
    words = (tmp_path / "small.yaml", "--data", tmp_path / "texts", "--train.steps", "100000")
    process = start("compare", *words, stderr=subprocess.PIPE, start_new_session=True)
    metrics = tmp_path / "out" / "runs" / "attention-0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "saved at step" in said
    assert "Traceback" not in said


GENERATED = """
output: {folder}/out
seeds: [0, 1]
jobs: 2
sweep: {{learning_rates: [1e-3, 1e-2], steps: 2}}
answers: {{lengths: [9, 17], samples: 3}}
train:
  data: {{generated: {{tasks: [mqar, copy], lengths: [9, 17]}}}}
  model: {{vocab_size: 258, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16, remat: none}}
  steps: 3
  batch_size: 2
  sequence_length: 16
  evaluate: {{every: 3, batches: 1}}
  metrics: {{tensorboard: "off"}}
models:
  attention: {{model: {{mixers: [attention]}}}}
  window: {{model: {{mixers: [sliding_attention], attention: {{sliding_window: 4}}}}}}
"""


@pytest.mark.slow
def test_models_of_generated_sequences_are_scored_by_their_answers(tmp_path):
    (tmp_path / "generated.yaml").write_text(GENERATED.format(folder=tmp_path))
    done = compare(tmp_path / "generated.yaml")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    values = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert values["sizes"] == {"mqar": [2, 4], "copy": [3, 7]}
    for model in values["models"]:
        assert {task: np.shape(found) for task, found in model["by_task"].items()} == {"mqar": (2, 2), "copy": (2, 2)}
        losses = [one["loss"] for one in values["sweep"][model["name"]]]
        rates = [one["learning_rate"] for one in values["sweep"][model["name"]]]
        assert values["runs"][model["name"]]["optimizer"]["learning_rate"] == rates[int(np.argmin(losses))]
    # A cache of 17 tokens, or of the window of 4: keys and values in float32, and the positions.
    states = [model["state_bytes"] for model in values["models"]]
    assert states[0] > 17 * 2 * 16 * 4 > states[1] > 4 * 2 * 16 * 4
    assert "Up to 2 runs were trained at the same time" in report
    assert (tmp_path / "out" / "report" / "recall.png").read_bytes().startswith(b"\x89PNG")
    again = compare(tmp_path / "generated.yaml")
    assert again.returncode == 0
    assert "recall" not in again.stderr


def test_generated_sequences_are_not_scored_on_text(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "generated.yaml").write_text(GENERATED.format(folder=tmp_path))
    for flag, says in (("--data", "leave out --data a/folder"), ("--test", "leave out a/folder")):
        with pytest.raises(InputError, match=says):
            main([str(tmp_path / "generated.yaml"), flag, "a/folder"])
    assert not (tmp_path / "out").exists()
