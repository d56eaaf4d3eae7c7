"""A new run starts from the parameters of another run or of a released checkpoint, and from nothing else of it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import tttlm
from tests.training.small import small_config
from tests.training.test_loop import numbers, params
from tttlm.errors import InputError
from tttlm.training import loop
from tttlm.training.checkpoint_files import saved_steps
from tttlm.training.config import TrainConfig
from tttlm.training.sharding import make_mesh
from tttlm.training.starting import initial_params

# One update so small that what it started from can be told from where it ends.
STILL = {"steps": 1, "optimizer.learning_rate": 1e-5, "evaluate.every": 0}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> TrainConfig:
    config = small_config(tmp_path_factory.mktemp("first") / "run", data)
    loop.train(config)
    return config


def assert_close(found, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, atol=3e-5, rtol=8e-3), found, wanted)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_starts_from_the_parameters_of_another(finished, data, tmp_path, dtype):
    config = small_config(tmp_path / "run", data, init_from=finished.run, **{**STILL, "model.param_dtype": dtype})
    assert loop.train(config).reason == "finished"
    assert_close(params(config), params(finished))
    (line,) = numbers(config)
    assert (line["step"], line["tokens_seen"]) == (1, 4 * 32)  # its steps are its own
    assert line["loss"] < numbers(finished)[0]["loss"] - 0.3


@pytest.mark.long
def test_any_checkpoint_of_it_can_be_named(finished, data, tmp_path):
    at_8 = small_config(tmp_path / "run", data, init_from=f"{finished.run}/checkpoints/8", **STILL)
    loop.train(at_8)
    losses = {line["step"]: line["loss"] for line in numbers(finished) if "loss" in line}
    assert numbers(at_8)[0]["loss"] == pytest.approx(losses[9], abs=0.1)
    with pytest.raises(AssertionError):
        assert_close(params(at_8), params(finished))


def test_a_run_starts_from_a_released_checkpoint(data, tmp_path):
    config = small_config(tmp_path / "run", data, init_from=str(tmp_path / "released"), **STILL)
    model = tttlm.LanguageModel(config.model, rngs=nnx.Rngs(7))
    tttlm.save_pretrained(model, tmp_path / "released")
    assert loop.train(config).reason == "finished"
    assert_close(params(config), nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_a_run_that_goes_on_does_not_start_again(finished, data, tmp_path):
    config = small_config(tmp_path / "run", data, init_from=finished.run, **STILL)
    loop.train(config)
    before = params(config)
    Path(finished.run).rename(tmp_path / "gone")
    assert loop.train(config).reason == "finished"
    (tmp_path / "gone").rename(finished.run)
    jax.tree.map(np.testing.assert_array_equal, params(config), before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_from": "no/such/run"}, "init_from = no/such/run is neither a run directory"),
        ({"model.hidden_size": 32}, r"parameter embed/embedding is \(300, 16\) there and \(300, 32\) here"),
        (
            {"model.mixers": ("ttt_linear",)},
            "has another model than `model` describes: parameter stack/blocks/0/conv/bias is missing",
        ),
        ({"init_from": "{run}/checkpoints/5"}, r"does not have a checkpoint of step 5; it has \[8, 12\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(finished, data, tmp_path, changes, says):
    changes = {"init_from": "{run}", **changes}
    changes["init_from"] = changes["init_from"].format(run=finished.run)
    with pytest.raises(InputError, match=says):
        loop.train(small_config(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(finished, data, tmp_path):
    other = Path(shutil.copytree(finished.run, tmp_path / "other"))
    facts = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps(facts | {"tokenizer": "other"}))
    with pytest.raises(InputError, match="trained with another tokenizer"):
        loop.train(small_config(tmp_path / "run", data, init_from=str(other)))


@pytest.mark.long
def test_a_run_goes_on_in_another_dtype(finished, data, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", data, **{"steps": 2, "checkpoint.every": 1})
    loop.train(config)
    kept = params(config)
    state = loop._Experiment.newest

    other = small_config(tmp_path / "run", data, **{"steps": 2, "checkpoint.every": 1, "model.param_dtype": "bfloat16"})
    found = []
    monkeypatch.setattr(loop._Experiment, "newest", lambda self: found.append(state(self)) or found[-1])
    assert loop.train(other).reason == "finished"
    ((restored, _),) = found
    assert {x.dtype.name for x in jax.tree.leaves(restored.params)} == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), restored.params, kept)
    assert saved_steps(Path(config.run) / "checkpoints") == [1, 2]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("rope_theta", 500_000.0, "rope_theta: 10000.0 there, 500000.0 here"),
        ("norm_eps", 1e-3, "norm_eps: 1e-06 there, 0.001 here"),
        ("num_heads", 1, "num_heads: 2 there, 1 here"),
    ],
)
def test_parameters_of_the_same_shapes_that_mean_something_else_are_refused(
    finished, data, tmp_path, field, value, says
):
    changes = {"init_from": finished.run, f"model.{field}": value, **STILL}
    with pytest.raises(InputError, match=says):
        loop.train(small_config(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run").exists()
    allowed = small_config(tmp_path / "run", data, init_from_changes=(field,), **changes)
    assert initial_params(allowed, loop.open_loaders(allowed, make_mesh(allowed.mesh))["train"].tokenizer.fingerprint)


def test_what_only_changes_how_it_is_computed_may_differ(finished, data, tmp_path):
    changes = {"model.remat": "block", "model.dtype": "bfloat16", "model.attention.max_length": 64}
    changes |= {"model.mamba.state_size": 5}  # of a mixer that is not there
    config = small_config(tmp_path / "run", data, init_from=finished.run, **changes, **STILL)
    assert initial_params(config, loop.open_loaders(config, make_mesh(config.mesh))["train"].tokenizer.fingerprint)


def test_parameters_with_a_flipped_bit_are_not_started_from(finished, data, tmp_path):
    other = Path(shutil.copytree(finished.run, tmp_path / "other"))
    for file in (other / "checkpoints" / "12" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    with pytest.raises(InputError, match="12 is damaged"):
        loop.train(small_config(tmp_path / "run", data, init_from=str(other), **STILL))
    assert not (tmp_path / "run").exists()
