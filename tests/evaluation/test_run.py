"""A run read back: as strictly as it was trained, from anywhere, with as much room as the text needs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.small import prepare_config, small_config, write_texts
from tttlm.data import prepare
from tttlm.errors import InputError
from tttlm.evaluation.run import load_run
from tttlm.training.loop import train


@pytest.mark.long
def test_caches_of_attention_get_room_for_what_is_scored(tmp_path):
    prepare(prepare_config(write_texts(tmp_path / "texts")), tmp_path / "data")
    options = {"steps": 1, "evaluate.every": 0, "model.attention.max_length": 32}
    train(small_config(tmp_path / "run", tmp_path / "data", **options))
    text = tmp_path / "text.txt"
    text.write_text("the red cat sees the blue bird. " * 20)  # 640 bytes, and as many tokens
    run = load_run(tmp_path / "run")
    scores = [run.score_file(text, chunk=chunk) for chunk in (48, 256)]
    assert scores[0].tokens == 640
    assert math.isfinite(scores[0].loss)
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
    roomy = load_run(tmp_path / "run", max_length=1024)
    assert run.score_held_out(chunk=32).loss == pytest.approx(roomy.score_held_out(chunk=256).loss, rel=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose model has more tokens than the tokenizer, and short caches of attention."""
    folder = tmp_path_factory.mktemp("finished")
    prepare(prepare_config(write_texts(folder / "texts")), folder / "data")
    options = {"steps": 1, "evaluate.every": 0, "model.attention.max_length": 32, "model.vocab_size": 2000}
    train(small_config(folder / "run", folder / "data", **options))
    return folder


@pytest.mark.long
def test_a_sample_goes_on_from_held_out_text_with_tokens_that_the_tokenizer_has(finished):
    run = load_run(finished / "run")
    first = next(run.held_out())
    prompt, written = run.sample(300, prompt_tokens=20)
    assert run.tokenizer().decode(first.tokens[1:].tolist()).startswith(prompt)
    assert len(prompt) == 20
    assert len(written.encode()) >= 100
    assert run.tokenizer().vocab_size < 2000


@pytest.mark.long
def test_a_run_is_evaluated_from_another_folder_without_the_data_or_elsewhere(finished, tmp_path, monkeypatch):
    here = load_run(finished / "run").score_held_out()
    moved = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    there = load_run(moved)
    assert there.score_held_out() == here
    text = tmp_path / "text.txt"
    text.write_text("the red cat sees the blue bird. " * 20)
    score = there.score_file(text)
    (finished / "data").rename(finished / "gone")
    assert load_run(moved).score_file(text) == score
    with pytest.raises(InputError, match=r"which is not there: .* or score text files with --text"):
        load_run(moved).score_held_out()
    (finished / "gone").rename(finished / "data")


def test_held_out_text_that_was_altered_or_is_other_text_is_not_scored(finished, tmp_path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    data = Path(shutil.copytree(finished / "data", tmp_path / "data"))
    facts = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(facts | {"held_out_folder": str(data)}))
    config = load_run(run).config
    elsewhere = replace(load_run(run), config=replace(config, data=replace(config.data, path=str(data))))
    assert elsewhere.score_held_out().tokens > 0
    tokens = max((path for path in data.rglob("*") if "validation" in path.name), key=lambda path: path.stat().st_size)
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(InputError, match="altered"):
        replace(elsewhere).score_held_out()
    (run / "data.json").write_text(json.dumps(facts | {"held_out": "other"}))
    with pytest.raises(InputError, match="has other held-out text than when"):
        load_run(run).score_held_out()


def test_a_model_with_a_flipped_bit_is_not_scored(finished, tmp_path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    for file in (run / "checkpoints" / "1" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_run(run)
