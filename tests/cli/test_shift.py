"""The command line of shift: text, images and arrays end in a table, JSON and a picture; bad input is one line."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special, stats

from tests.training.small import prepare_config, small_config, write_texts
from tttlm.cli.shift import ShiftConfig, compare_text, main
from tttlm.data import prepare
from tttlm.errors import InputError
from tttlm.evaluation.run import load_run
from tttlm.interop import save_pretrained
from tttlm.model import LanguageModel, ModelConfig, TTTConfig
from tttlm.training.loop import train

QUICK = ["--permutations", "19", "--pairs", "40"]


def compare(a, b, tmp_path, *flags) -> dict:
    output = tmp_path / "out"
    assert main([str(a), str(b), "--output", str(output), *QUICK, *flags]) == 0
    assert (output / "shift.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "shift.json").read_text())


def named(record, name) -> dict:
    return next(m for m in record["measures"] if m["name"] == name)


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = ["the", "a", "of", "sea", "ship", "wind", "king", "road", "stone", "$5", "and", "but"]
    for side, weights in (("a", np.ones(12)), ("b", np.arange(1, 13.0))):
        (tmp_path / side).mkdir()
        for i in range(12):
            words = rng.choice(vocabulary, 40, p=weights / weights.sum())
            (tmp_path / side / f"{i}.txt").write_text(" ".join(words))
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.long
def test_arrays(tmp_path, capsys):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) + np.array([0, 1.5, 0])
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    record = compare(tmp_path / "a.npy", tmp_path / "b.npy", tmp_path)
    assert record["kind"] == "arrays"
    assert record["samples"] == [60, 50]
    assert record["differs_most"][0]["name"] == "feature 1"
    assert record["differs_most"][0]["more_in_b"]
    # The numbers are those of the library.
    from tttlm.shift import frechet_distance

    assert named(record, "Frechet distance")["value"] == pytest.approx(frechet_distance(a, b).value, rel=1e-4)
    table = capsys.readouterr().out
    for m in record["measures"]:
        assert m["name"] in table
    assert table.strip().endswith("shift.png")


@pytest.mark.long
def test_images_of_two_formats(tmp_path):
    from matplotlib.image import imsave

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, (2, 20, 5, 6), dtype=np.uint8)
    b[:, 2, 3] = 255
    (tmp_path / "png").mkdir()
    np.save(tmp_path / "a.npy", a)
    for i, image in enumerate(b):
        imsave(tmp_path / "png" / f"{i}.png", image, cmap="gray", vmin=0, vmax=255)
    record = compare(tmp_path / "a.npy", tmp_path / "png", tmp_path)
    assert record["kind"] == "images"
    assert record["num_features"] == 30
    assert record["differs_most"][0]["name"] == "pixel (2, 3)"


@pytest.mark.long
def test_text_by_words(texts, tmp_path, capsys):
    record = compare(*texts, tmp_path)
    assert record["kind"] == "text"
    assert named(record, "Jensen-Shannon, token counts")["p_value"] == 0.05  # one of twenty
    assert record["differs_most"][0]["name"] in ("'the'", "'a'", "'of'", "'but'", "'and'")
    assert "by document" in capsys.readouterr().out
    # The same text on both sides: no shift is found.
    same = compare(texts[0], texts[0], tmp_path)
    assert named(same, "Jensen-Shannon, token counts")["value"] == 0
    assert named(same, "Jensen-Shannon, token counts")["p_value"] == 1
    assert named(same, "MMD^2, median bandwidth")["p_value"] > 0.05


@pytest.mark.long
def test_text_by_the_features_of_a_released_model(texts, tmp_path):
    config = ModelConfig(
        vocab_size=258,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        mixers=("ttt_linear",),
        ttt=TTTConfig(mini_batch_size=8),
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model")
    flags = ("--model", str(tmp_path / "model"), "--tokenizer", "bytes", "--length", "64", "--per_document", "1")
    record = compare(*texts, tmp_path, *flags)
    assert record["num_features"] == 16
    assert "last hidden state" in record["features"]
    assert named(record, "AUC of logistic classifier")["value"] > 0.6
    # What the model reads is the stretch and nothing of what fills the batch up.
    from tttlm.shift.reading import Stretches
    from tttlm.shift.tokens import read_by_model

    tokens = np.frombuffer((texts[0] / "0.txt").read_bytes(), np.uint8)[:50].astype(np.uint32)
    stretches = [tokens, tokens[:20], tokens[:1]]
    found, predictions = read_by_model(model, Stretches(stretches, np.arange(3)), length=64)
    for stretch, features in zip(stretches, found, strict=True):
        np.testing.assert_allclose(
            features, model.features(jnp.asarray(stretch[None], jnp.int32))[0].mean(0), rtol=1e-4, atol=1e-5
        )
    # Each stretch but that of one token has a prediction, that of its last token from those before it.
    logits = np.concatenate([model(jnp.asarray(s[None, :-1], jnp.int32))[:, -1] for s in stretches[:2]])
    p = special.softmax(logits, 1)
    np.testing.assert_allclose(predictions.confidence, p.max(1), rtol=1e-4)
    np.testing.assert_allclose(predictions.entropy, stats.entropy(p, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(predictions.right, p.argmax(1) == [s[-1] for s in stretches[:2]])
    for name in ("drop of mean maximum softmax", "rise of mean entropy"):
        assert named(record, name)["low"] < named(record, name)["high"]
    for name in ("accuracy on B predicted by ATC", "accuracy on B predicted by DoC"):
        assert named(record, name)["note"].startswith("it is 0.")


def test_text_by_the_features_of_a_run(texts, tmp_path):
    prepare(prepare_config(write_texts(tmp_path / "texts")), tmp_path / "data")
    train(small_config(tmp_path / "run", tmp_path / "data", **{"steps": 1, "evaluate.every": 0}))
    config = ShiftConfig(model=str(tmp_path / "run"), length=32, per_document=2)
    compared = compare_text(config, *texts)
    model = load_run(tmp_path / "run").model
    assert compared.a.shape == (24, model.config.hidden_size)
    # The first stretch of the first document, in the run's own tokens.
    tokens = load_run(tmp_path / "run").tokenizer().encode((texts[0] / "0.txt").read_text())[:32]
    expected = model.features(jnp.asarray([tokens], jnp.int32))[0].astype(jnp.float32).mean(0)
    np.testing.assert_allclose(compared.a[0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="has its own tokenizer"):
        compare_text(replace(config, tokenizer="bytes"), *texts)


def test_unusable_input_is_one_line(texts, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((20, 4)))
    np.save(tmp_path / "narrow.npy", np.ones((20, 3)))
    np.save(tmp_path / "few.npy", np.ones((5, 4)))
    np.save(tmp_path / "nan.npy", np.full((20, 4), np.nan))
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    a, wide = str(texts[0]), str(tmp_path / "wide.npy")
    for arguments, says in (
        ([], "name two samples, got 0"),
        ([a], "name two samples, got 1"),
        ([a, str(tmp_path / "no")], "no does not exist"),
        ([a, wide], "has text and .* has arrays"),
        ([wide, str(tmp_path / "narrow.npy")], "has 4 features and .* has 3"),
        ([wide, str(tmp_path / "few.npy")], "sample B has 5 samples; this measure needs at least 8"),
        ([wide, str(tmp_path / "nan.npy")], "nan.npy has NaN or infinite features in 20 of 20 samples"),
        ([wide, wide, "--output", str(tmp_path / "file" / "x")], "--output .* cannot be written"),
        ([wide, wide, "--model", a], "--model and --tokenizer are for text"),
        ([a, a, "--model", str(tmp_path / "model")], "is not a model"),
        ([a, a, "--tokenizer", "no.model"], "tokenizer no.model does not exist"),
        ([a, a, "--permutations", "3"], "'permutations' must be at least 19, got 3"),
        ([a, a, "--pairs", "3"], "'pairs' must be at least 8 or 0, got 3"),
        ([a, a, "--kind", "sound"], "sound"),
        ([a, a, "--image_size", "8"], "image_size = 8 is not used for text"),
        ([wide, wide, "--length", "8"], "length = 8 is not used for arrays"),
        ([a, a, "--kind", "images"], "has no images in it: there are no .png files"),
        ([a, a, "--lenght", "8"], "unknown flag '--lenght' .*did you mean '--length'"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            main([*arguments, *([] if "--output" in arguments else ["--output", str(tmp_path / "out")])])
        assert "\n" not in str(caught.value)
