"""Models read each other's text: what is reported is what was measured, and the command refuses what it cannot use."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from tttlm.adaptation.language_model import DynamicConfig, DynamicEvaluation
from tttlm.adaptation.text import Reader, TextConfig, measure_shifts, read_all, write_text_report
from tttlm.cli.adapt import main
from tttlm.errors import InputError
from tttlm.model import LanguageModel, ModelConfig
from tttlm.training.loss import token_losses


@pytest.fixture(scope="module")
def readers():
    config = ModelConfig(
        vocab_size=128, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, mixers=("ttt_linear",)
    )
    make = lambda seed: nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(seed)))()
    encode = lambda text: np.array([0, *text.encode()], np.int32)
    texts = ["abcab" * 60, "abc" * 20], ["xyzzyx" * 80]
    return [Reader(name, make(i), encode, texts[i]) for i, name in enumerate(("first", "second"))]


@pytest.mark.long
def test_every_model_reads_every_text_and_the_report_says_what_it_made_of_it(readers, tmp_path, monkeypatch):
    adapt = DynamicConfig(learning_rate=0.2, stretch=16)
    readings = read_all(readers, adapt, tmp_path)
    assert [(r.model, r.text) for r in readings] == [
        ("first", "first"),
        ("first", "second"),
        ("second", "first"),
        ("second", "second"),
    ]
    tokens = readers[0].encode(readers[1].texts[0])[None]
    logits = nnx.jit(lambda model, tokens: model(tokens))(readers[0].model, tokens[:, :-1])
    nats = float(token_losses(logits, tokens[:, 1:]).sum())
    assert readings[1].static == pytest.approx(nats / np.log(2) / 480, rel=1e-4)
    assert readings[1].tokens == readings[1].bytes == 480
    for reading in readings:  # text that repeats itself is learned
        assert reading.dynamic < reading.static - 0.5
        assert reading.dynamic_curve[-1] < reading.dynamic_curve[0]
        assert np.average(reading.static_curve) == pytest.approx(reading.static * np.log(2), rel=0.02)

    monkeypatch.setattr(DynamicEvaluation, "__call__", None)  # nothing is read twice
    assert read_all(readers, adapt, tmp_path) == readings
    with pytest.raises(TypeError):
        read_all(readers, replace(adapt, steps=2), tmp_path)

    shifts = measure_shifts(readers, 16)
    assert set(shifts) == {"first to second", "second to first"}
    counts = {m.name: m.estimate.value for m in shifts["first to second"] if m.estimate}
    assert counts["Jensen-Shannon, token counts"] > 0.5  # of at most ln 2: no token is shared
    report = write_text_report(readings, shifts, TextConfig(adapt=adapt), "a command", tmp_path / "report")
    assert f"| first | second | 480 | {readings[1].static:.3f} |" in report.read_text()
    assert json.loads((tmp_path / "report/report.json").read_text())["readings"][1]["text"] == "second"
    assert (tmp_path / "report/losses.png").read_bytes()[:4] == b"\x89PNG"


def test_a_command_without_two_runs_is_refused_in_a_line(tmp_path):
    file = tmp_path / "text.yaml"
    file.write_text("kind: text\nruns: [one]\n")
    with pytest.raises(InputError, match="at least two runs"):
        main([str(file)])
    file.write_text(f"kind: text\nruns: [{tmp_path}/one, {tmp_path}/two]\n")
    with pytest.raises(InputError, match="one is not a run directory"):
        main([str(file)])
