"""A run read back: what of attention is too short for a text is made longer, not left wrong."""

import math

import pytest

from tests.training.small import prepare_config, small_config, write_texts
from tttlm.data import prepare
from tttlm.evaluation.run import load_run
from tttlm.training.loop import train


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
