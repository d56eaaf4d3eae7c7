"""The evaluation by command: numbers are those of the models, what was stopped goes on, bad input is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tttlm.cli import generate
from tttlm.cli.eval import main
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.errors import InputError
from tttlm.evaluation import evaluate as evaluation
from tttlm.evaluation.journal import NAME, Journal
from tttlm.inference import stream_losses
from tttlm.interop import from_pretrained, save_pretrained
from tttlm.model import AttentionConfig, LanguageModel, ModelConfig, TTTConfig

WORDS = ("the", "red", "cat", "sees", "a", "blue", "bird", "and", "then", "a", "green", "tree", "on", "river")
SMALL = ["--positions.windows", "32", "--positions.reset_every", "32", "--positions.resamples", "100", "--chunk", "32"]
RECALL = ["--recall.tasks", "passkey", "copy", "--recall.lengths", "100", "--recall.depths", "0", "1"]


def write_model(path: Path, seed: int, **changes) -> Path:
    config = ModelConfig(
        vocab_size=258,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=16,
        ttt=TTTConfig(mini_batch_size=8),
        attention=AttentionConfig(max_length=64),
        **changes,
    )
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(seed)))()
    nnx.update(model, jax.tree.map(lambda x: x * 4, nnx.state(model, nnx.Param)))
    save_pretrained(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, and a folder of three texts."""
    path = tmp_path_factory.mktemp("evaluated")
    write_model(path / "a", 0)
    write_model(path / "b", 1)
    (path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for number, length in enumerate((60, 25, 90)):
        (path / "texts" / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, length)))
    return path


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    models = [str(folder / "a"), str(folder / "b")]
    named = ["--text", str(folder / "texts"), "--tokenizer", "bytes", "--output", str(output)]
    return [*models, *more, *named, *SMALL, *RECALL]


@pytest.mark.long
def test_tables_results_and_pictures_of_all_tasks(folder, tmp_path, capsys, monkeypatch):
    arguments = flags(folder, tmp_path / "out", "--task", "loss", "positions", "recall")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["format"] == 1
    assert [model["name"] for model in results["models"]] == ["a", "b"]
    for name in ("positions.png", "gain.png", "recall_passkey.png", "recall_copy.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") > 50

    model, tokenizer = from_pretrained(folder / "a"), ByteTokenizer()
    documents = [[256 + 1, *path.read_bytes()] for path in sorted((folder / "texts").iterdir())]
    of = [np.concatenate([p.nats for p in stream_losses(model, [[np.asarray(d)]], batch_size=1)]) for d in documents]
    loss = {(one["model"], one["text"]): one for one in results["loss"]}
    for number, nats in enumerate(of):
        assert loss["a", f"{number}.txt"]["nats"] == pytest.approx(nats.sum(), rel=1e-5)
    words = sum(len(tokenizer.decode(d[1:]).split()) for d in documents)
    total = sum(nats.sum() for nats in of)
    assert loss["a", "all"]["word_perplexity"] == pytest.approx(np.exp(total / words), rel=1e-4)
    assert loss["a", "all"]["bits_per_byte"] == pytest.approx(total / np.log(2) / sum(map(len, of)), rel=1e-5)

    curves = {(c["kind"], c["model"], c["protocol"]): c for c in results["positions"]}
    stream, gain = curves["loss", "a", "stream"], curves["gain", "a", "stream"]
    at = stream["bins"].index(32)
    first = np.concatenate([nats[32 : stream["bins"][at + 1]] for nats in of])
    assert stream["mean"][at] == pytest.approx(first.mean(), rel=1e-4)
    assert stream["tokens"][at] == len(first)
    assert gain["mean"][:at] == pytest.approx([0] * at, abs=1e-5)  # before the first reset nothing differs
    again = [
        np.concatenate([p.nats for p in stream_losses(model, [[np.asarray(d[32:])]], batch_size=1)]) for d in documents
    ]
    reset = np.concatenate([nats[: stream["bins"][at + 1] - 32] for nats in again])
    assert gain["mean"][at] == pytest.approx(reset.mean() - first.mean(), abs=1e-4)
    assert curves["difference", "b", "windows 32"]["against"] == "a"
    assert len(results["recall"]) == 2 * (2 + 1)
    assert f"{stream['mean'][at]:.4f}" in printed

    def never(*arguments: object, **options: object):
        raise AssertionError("what was kept is computed again")

    monkeypatch.setattr("tttlm.evaluation.protocols.stream_losses", never)
    monkeypatch.setattr(evaluation, "stream_losses", never)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == results["positions"]


@pytest.mark.long
def test_an_evaluation_that_was_stopped_goes_on_with_the_documents_that_are_left(folder, tmp_path, monkeypatch, capsys):
    arguments = [*flags(folder, tmp_path, "--batch_size", "1"), "--json"]
    put, kept = Journal.put, []

    def stopping(self: Journal, key: dict, value: object) -> None:
        put(self, key, value)
        kept.append(key["text"])
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    with open(tmp_path / NAME, "a") as stream:
        stream.write('{"digest": "half a li')
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["loss"]
    assert len(kept) == len({*kept[:3]}) + 3 == 6  # three texts for each model, none twice
    monkeypatch.undo()
    assert main([*flags(folder, tmp_path / "whole", "--batch_size", "1"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == found
    (tmp_path / NAME).write_text((tmp_path / NAME).read_text().replace('"tokens": ', '"tokens": 1', 1))
    with pytest.raises(InputError, match="line 1: was altered"):
        main(arguments)


def test_a_stored_result_that_was_altered_is_refused_and_a_folder_is_made_for_the_first_result(tmp_path):
    folder = tmp_path / "not" / "yet"
    journal = Journal(folder)
    assert not (tmp_path / "not").exists()
    journal.put({"text": "a"}, {"nats": [1.5]})
    assert Journal(folder).get({"text": "a"}) == {"nats": [1.5]}
    line = (folder / NAME).read_text()
    for other in (
        line.replace("1.5", "1.25"),
        line.replace('"a"', '"b"'),
        line.replace('{"nats": [1.5]}', "3"),
        "[]\n",
    ):
        assert other != line
        (folder / NAME).write_text(other)
        with pytest.raises(InputError, match="line 1: was altered"):
            Journal(folder)


@pytest.mark.long
def test_a_model_whose_losses_are_no_numbers_is_refused_and_not_reported(folder, tmp_path):
    model = from_pretrained(folder / "a")
    nnx.update(model, jax.tree.map(lambda x: x * np.nan, nnx.state(model, nnx.Param)))
    save_pretrained(model, tmp_path / "broken")
    arguments = [str(tmp_path / "broken"), "--tokenizer", "bytes", "--text", str(folder / "texts" / "1.txt")]
    with pytest.raises(InputError, match=r"broken: the loss on 1.txt is nan, so its parameters are not finite"):
        main([*arguments, "--chunk", "32", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="the model's outputs are not numbers"):
        generate.main([*arguments[:3], "--prompt", "a", "--max_tokens", "3"])


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "tttlm.cli.eval", *flags(folder, tmp_path, "--batch_size", "1")]
    code = f"import sys; sys.argv = {command[2:]!r}; from tttlm.cli.eval import run; run()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    journal = tmp_path / NAME
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes().count(b"\n")
    assert main(flags(folder, tmp_path)) == 0
    assert journal.read_bytes().count(b"\n") == 6
    assert before >= 1


@pytest.mark.long
def test_results_of_a_text_are_kept_when_a_longer_one_is_added(folder, tmp_path, capsys):
    """And in a folder of results there are pictures of these results only."""
    flags = [str(folder / "a"), "--tokenizer", "bytes", "--output", str(tmp_path), "--chunk", "32", "--json"]
    both = [*flags, "--task", "loss", "positions", "--positions.protocols", "stream", "--positions.resamples", "100"]
    files = [str(folder / "texts" / f"{number}.txt") for number in range(3)]
    assert main([*both, "--text", files[1]]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*both, "--text", *files]) == 0
    together = json.loads(capsys.readouterr().out)
    lines = [json.loads(line)["of"] for line in (tmp_path / NAME).read_text().splitlines()]
    assert len({json.dumps(line) for line in lines}) == len(lines) == 6
    of = {one["text"]: one["loss"] for one in together["loss"]}
    assert of["1.txt"] == alone["loss"][0]["loss"]
    assert main([*both, "--text", *files[1:]]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"][0]["loss"] == of["1.txt"]
    assert (tmp_path / "positions.png").exists()
    assert main([*flags, "--task", "loss", "--text", files[1]]) == 0
    assert not (tmp_path / "positions.png").exists()


@pytest.mark.long
def test_another_inner_model_is_evaluated_and_said(folder, capsys):
    text = ["--text", str(folder / "texts" / "0.txt"), "--tokenizer", "bytes", "--chunk", "32", "--json"]

    def loss(*more: str) -> tuple[float, list[str]]:
        assert main([str(folder / "a"), *text, *more]) == 0
        results = json.loads(capsys.readouterr().out)
        return results["loss"][0]["loss"], results["notes"]

    plain, none = loss()
    other, said = loss("--inner.mini_batch_size", "16", "--inner.learning_rate", "0.5")
    assert none == []
    assert abs(plain - other) > 1e-4
    assert said == ["a: inner mini-batches of 16", "a: inner learning rate times 0.5"]
    learned, _ = loss("--adapt.learning_rate", "0.5")
    assert learned == pytest.approx(plain)


def test_runs_with_the_same_folder_name_have_names_of_their_own(folder, tmp_path, capsys):
    shutil.copytree(folder / "b", tmp_path / "a")
    text = ["--text", str(folder / "texts" / "1.txt"), "--tokenizer", "bytes", "--chunk", "32", "--json"]
    assert main([str(folder / "a"), str(tmp_path / "a"), str(folder / "b"), *text]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in results["models"]] == [f"{folder.name}/a", f"{tmp_path.name}/a", "b"]
    losses = {one["model"]: one["loss"] for one in results["loss"]}
    assert losses[f"{tmp_path.name}/a"] == losses["b"] != losses[f"{folder.name}/a"]


def test_bad_input_is_refused_in_one_line_before_anything_is_computed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tttlm.inference.scoring._score", None)
    attention = write_model(tmp_path / "attention", 0, mixers=("attention",), tie_embeddings=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    texts = ["--text", str(folder / "texts")]
    model, known = str(folder / "a"), ["--tokenizer", "bytes"]
    bad = [
        ([], "name the folder of a run"),
        ([str(tmp_path / "none")], "is no folder"),
        ([model, str(folder / "texts" / ".." / "a"), *texts, *known], "is named twice"),
        ([str(tmp_path / "empty"), *texts], "neither the folder of a run"),
        ([model, *texts], "no tokenizer in"),
        ([model, *known], "has no held-out text: name texts with --text"),
        ([model, *known, "--text", str(tmp_path / "empty")], "no files under"),
        ([model, *known, "--text", str(tmp_path / "none")], "no files under"),
        ([model, *known, *texts, "--output", str(tmp_path / "file")], "cannot be written"),
        ([model, *known, *texts, "--task", "positions"], r"fewer than a window of 2,048"),
        ([model, *known, *texts, "--task", "recall", "--recall.lengths", "20"], "takes more than the 20 tokens"),
        ([model, *known, *texts, "--task", "recall", "--recall.lengths", "9000"], "fewer than a haystack"),
        ([str(attention), *known, *texts, "--max_length", "64"], r"has room for 64: raise --max_length"),
        ([str(attention), *known, *texts, "--inner.mini_batch_size", "4"], "no inner mini-batches"),
        ([model, *known, *texts, "--step", "3"], "has no steps"),
        ([model, *known, *RECALL, "--task", "recall", *texts, "--recall.samples", "2000000"], "tokens, at most"),
        ([model, *known, "--task", "recall", "--recall.lengths", "5"], "must be at least 6"),
        ([model, *known, *texts, "--limit", "3"], "limit = 3 is not used with --text"),
        ([model, *known, *texts, "--adapt.steps", "3"], "adapt.steps = 3 is not used without --adapt.learning_rate"),
        ([model, *known, "--text", ""], "a name of --text is empty"),
        (
            [model, *known, *texts, "--task", "positions", "--positions.length", "9"],
            "--positions.length 9 is less than a window of 2,048",
        ),
        ([model, *known, *texts, "--task", "recall", "--recall.lengths"], "needs at least one of --recall.lengths"),
    ]
    for arguments, words in bad:
        with pytest.raises(InputError, match=words) as error:
            main(arguments)
        assert "\n" not in str(error.value)
