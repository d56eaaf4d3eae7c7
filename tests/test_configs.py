"""The configurations of the published sizes are the paper's recipe, and their models have the published sizes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tttlm.cli.arguments import parse
from tttlm.mixers import mixer_names, registered
from tttlm.model import ModelConfig, parameter_count
from tttlm.training.config import TrainConfig, check

CONFIGS = Path(__file__).parents[1] / "configs"
CONTEXTS = {"": 2048, "8k": 8192, "32k": 32768}
MODELS = {
    "ttt_linear_mamba": ("ttt_linear", "mamba"),
    "ttt_linear_transformer": ("ttt_linear", "transformer"),
    "ttt_mlp_mamba": ("ttt_mlp", "mamba"),
    "ttt_mlp_transformer": ("ttt_mlp", "transformer"),
    "transformer": ("attention", "mamba"),
    "mamba": ("mamba", "mamba"),
    "mamba2": ("mamba2", "mamba"),
}
RECIPE = {"125m": (4800, 3e-3), "350m": (13500, 1.5e-3), "760m": (29000, 1.25e-3), "1.3b": (50000, 1e-3)}

LEARNERS = sorted((CONFIGS / "125m" / "learners").glob("*.yaml"))


def read(file: Path) -> TrainConfig:
    config = parse(TrainConfig, ["--config", str(file)], prog="train.py")
    check(config)
    return config


@pytest.mark.long
@pytest.mark.parametrize("size", RECIPE)
def test_every_model_of_a_size_has_the_papers_recipe_at_every_context(size):
    steps, rate = RECIPE[size]
    for context, length in CONTEXTS.items():
        for name, (mixer, backbone) in MODELS.items():
            config = read(CONFIGS / size / context / f"{name}.yaml")
            assert config.batch_size * config.sequence_length == 2**19
            assert config.sequence_length == length
            assert (config.steps, config.optimizer.learning_rate) == (steps, rate)
            assert (config.warmup_steps, config.schedule.final) == (steps // 10, 1e-5)
            adam = config.optimizer
            assert (adam.b1, adam.b2, adam.weight_decay, adam.clip) == (0.9, 0.95, 0.1, 1.0)
            # As the official JAX trainer has it, see docs/recipe.md.
            start = config.schedule.warmup_start
            assert (adam.name, adam.decay, start, config.model.conv_init) == ("adamw", "all", "zero", "lecun_normal")
            assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
            assert config.batch_size * config.loss_chunk == 2**15
            assert config.model.rope_theta == (5e5 if name == "transformer" and length > 2048 else 1e4)
            assert config.inner_start == (0.1 if mixer == "ttt_mlp" else 1.0)
            if mixer == "attention":
                assert config.model.attention.max_length >= length
            preset = ModelConfig.preset(size, mixer=mixer, backbone=backbone)
            for field in (
                "mixers",
                "backbone",
                "num_layers",
                "hidden_size",
                "num_heads",
                "intermediate_size",
                "vocab_size",
            ):
                assert getattr(config.model, field) == getattr(preset, field), (size, name, field)


@pytest.mark.long
def test_no_other_files_stand_among_them_and_no_two_share_a_folder_of_runs():
    runs = []
    for size in RECIPE:
        files = set((CONFIGS / size).rglob("*.yaml")) - {CONFIGS / size / "size.yaml", *LEARNERS}
        assert {(file.parent.relative_to(CONFIGS / size), file.stem) for file in files} == {
            (Path(context), name) for context in CONTEXTS for name in MODELS
        }
        runs += [read(file).run for file in files]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("file", LEARNERS, ids=lambda file: file.stem)
def test_every_published_learner_has_a_model_with_the_parameters_of_the_transformer(file):
    config, transformer = read(file), read(CONFIGS / "125m" / "transformer.yaml")
    assert file.stem in config.model.mixers
    assert parameter_count(config.model) == pytest.approx(parameter_count(transformer.model), rel=0.01)
    same = ("steps", "batch_size", "sequence_length", "optimizer", "schedule", "data")
    assert all(getattr(config, field) == getattr(transformer, field) for field in same)
    assert config.run.endswith(file.stem)


def test_every_published_learner_has_a_configuration():
    learners = {name for name in mixer_names() if registered(name).__module__.startswith("tttlm.mixers.learners")}
    assert {file.stem for file in LEARNERS} == learners


@pytest.mark.parametrize(
    ("size", "mamba", "mamba2"),
    [
        # state-spaces/mamba-130m to mamba-1.4b; mamba2-130m to mamba2-1.3b by their names
        ("125m", 129_135_360, 130e6),
        ("350m", 371_516_416, 370e6),
        ("760m", 793_204_224, 780e6),
        ("1.3b", 1_372_178_432, 1.3e9),
    ],
)
def test_models_of_mamba_have_as_many_parameters_as_the_released_ones(size, mamba, mamba2):
    counts = [
        parameter_count(dataclasses.replace(read(CONFIGS / size / f"{name}.yaml").model, vocab_size=50_280))
        for name in ("mamba", "mamba2")
    ]
    assert counts == [mamba, pytest.approx(mamba2, rel=0.035)]


@pytest.mark.parametrize("size", RECIPE)
def test_parameters_are_what_the_shapes_of_the_paper_give(size):
    models = {name: read(CONFIGS / size / f"{name}.yaml").model for name in MODELS}
    counts = {name: parameter_count(model) for name, model in models.items()}
    m = models["transformer"]
    block = (
        4 * m.hidden_size**2 + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    )  # attention, gated feed-forward, two norms
    assert counts["transformer"] == m.vocab_size * m.hidden_size + m.num_layers * block + m.hidden_size
    named = float(size[:-1]) * (1e9 if size.endswith("b") else 1e6)
    for name, count in counts.items():
        assert 0.85 < count / named < 1.05, (size, name)


def test_a_configuration_is_made_before_any_device_is_asked_for():
    """Processes of a cluster can only be joined before that."""
    program = (
        "from jax._src import xla_bridge; from tests import test_configs as of\n"
        "for file in [of.CONFIGS / 'quickstart.yaml', *of.CONFIGS.glob('125m/*.yaml'), *of.LEARNERS]: of.read(file)\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False"]
