"""The ready comparisons are whole: every model can be trained, and no two are the same."""

import dataclasses
import functools
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from tttlm.cli.compare import read_comparison
from tttlm.comparison.experiment import matched_models
from tttlm.data import Batch
from tttlm.mixers import mixer_names, registered
from tttlm.model import parameter_count
from tttlm.training.config import TrainConfig, check
from tttlm.training.loop import train
from tttlm.training.metrics import by_step, read_metrics
from tttlm.training.sharding import make_mesh
from tttlm.training.step import Model, make_init, make_train_step
from tttlm.yaml_file import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs" / "compare"
FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "shared")
SLOW = ("small", "context", "recall")  # matched in two fields, which counts the parameters of many shapes
LEARNERS = tuple(read_yaml(CONFIGS / "learners.yaml")["models"])
ABLATION = ["linear_attention", "learned_start", "norm_and_residual", "mini_batch_16", "learned_rate", "mamba_backbone"]


@functools.cache
def read(name: str) -> dict[str, TrainConfig]:
    config, models, given, order = read_comparison([str(CONFIGS / f"{name}.yaml"), "--data", "a/folder"])
    assert not given
    assert order == list(models)
    matched = matched_models(config.match, models, {})
    return {name: dataclasses.replace(run, model=matched[name].config) for name, run in models.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FILES])
def test_every_model_of_a_comparison_can_be_trained_and_no_two_are_the_same(name):
    models = read(name)
    for run in models.values():
        text = {} if run.data.generated.tasks else {"path": "a/folder"}
        check(dataclasses.replace(run, data=dataclasses.replace(run.data, **text)))
    assert len({run.model for run in models.values()}) == len(models)
    for field in ("steps", "batch_size", "sequence_length", "optimizer", "data"):
        assert len({repr(getattr(run, field)) for run in models.values()}) == 1


@pytest.mark.long
def test_the_small_comparison_has_every_layer_and_models_of_one_size():
    models = read("small")
    assert {mixer for run in models.values() for mixer in run.model.mixers} == {
        *("attention", "ttt_linear", "ttt_mlp", "mamba", "mamba2", "sliding_attention")
    }
    sizes = [parameter_count(run.model) for run in models.values()]
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.long
def test_the_comparison_of_learners_has_every_published_one():
    models = read("learners")
    learners = {name for name in mixer_names() if registered(name).__module__.startswith("tttlm.mixers.learners")}
    assert len(learners) == 15
    assert learners <= {mixer for run in models.values() for mixer in run.model.mixers}
    sizes = [parameter_count(run.model) for run in models.values()]
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_model_of_the_comparison_of_learners_learns_at_its_own_shape(name):
    config = read("learners")[name]
    at_once = dataclasses.replace(config.schedule, warmup_steps=1, inner_warmup_steps=1)
    config = dataclasses.replace(config, steps=8, schedule=at_once)
    model, mesh = Model(config.model), make_mesh(config.mesh, jax.devices()[:1])
    state, step = make_init(config, model, mesh)(), make_train_step(config, model, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (config.batch_size, config.sequence_length + 1)).astype(np.int32)
    losses = []
    for _ in range(config.steps):
        state, numbers = step(state, Batch(tokens[:, :-1], tokens[:, 1:]))
        assert numbers["good"]
        losses.append(float(numbers["loss"]))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", ["ablation", "125m_ablation"])
def test_every_row_of_the_ablation_changes_one_thing(name):
    """Table 1 of the paper, from theorem 1 to TTT-Linear."""
    models = read(name)
    assert list(models) == ABLATION
    first, last = models["linear_attention"].model, models["mamba_backbone"].model
    assert first.ttt.mini_batch_size == models["linear_attention"].sequence_length
    off = ("learned_start", "inner_norm", "inner_bias", "learned_rate")
    assert not any(getattr(first.ttt, option) for option in off)
    assert last == dataclasses.replace(last, ttt=type(last.ttt)(inner_learning_rate=1.0), backbone="mamba")
    changed = []
    rows = [run.model for run in models.values()]
    for before, after in pairwise(rows):
        fields = [f.name for f in dataclasses.fields(after.ttt)]
        changed.append({f for f in fields if getattr(before.ttt, f) != getattr(after.ttt, f)})
        assert dataclasses.replace(after, ttt=before.ttt, backbone=before.backbone) == before
    assert changed == [
        {"learned_start", "inner_bias"},
        {"inner_norm"},
        {"mini_batch_size"},
        {"learned_rate", "inner_learning_rate"},
        set(),
    ]


@pytest.mark.slow
def test_the_transformer_learns_to_recall(tmp_path):
    _, models, _, _ = read_comparison([str(CONFIGS / "recall.yaml")])
    train(dataclasses.replace(models["transformer"], run=str(tmp_path / "run")))
    losses = by_step(read_metrics(tmp_path / "run" / "metrics.jsonl"), "validation_loss")[:, 1]
    # A guess among the values and tokens in the context costs 0.7 to 2.7 nats.
    assert losses[-1] < 0.1 < 1.0 < losses[0]
