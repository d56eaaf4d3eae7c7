"""A run small enough for tests, and the text it reads."""

import dataclasses
import random
from pathlib import Path
from typing import Any

from tttlm.data import DataConfig, PrepareConfig
from tttlm.model import ModelConfig
from tttlm.training.config import CheckpointConfig, EvaluateConfig, MetricsConfig, TrainConfig

WORDS = (
    *("the", "a", "red", "blue", "green", "cat", "dog", "bird", "tree", "house", "river"),
    *("sees", "hears", "likes", "finds", "and", "then", "while", "in", "on", "under"),
)


def write_texts(folder: Path, count: int = 24) -> Path:
    """Documents that a small model can learn something from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = random.Random(number)
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(40, 160)))
        (folder / f"{number:02d}.txt").write_text(text + ".\n")
    return folder


def small_config(run: str | Path = "run", data: str | Path = "data", **changes: Any) -> TrainConfig:
    """A run of bytes on two small blocks of attention, which compile fast; `changes` by dotted name."""
    config = TrainConfig(
        run=str(run),
        data=DataConfig(path=str(data)),
        model=ModelConfig(
            vocab_size=300,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=16,
            mixers=("attention",),
            remat="none",
        ),
        steps=12,
        batch_size=4,
        sequence_length=32,
        evaluate=EvaluateConfig(every=5, batches=2),
        checkpoint=CheckpointConfig(every=4),
        metrics=MetricsConfig(tensorboard="off"),
    )
    for name, value in changes.items():
        config = _replace(config, name.split("."), value)
    return config


def prepare_config(texts: Path) -> PrepareConfig:
    return PrepareConfig(source=(str(texts),), tokenizer="bytes", held_out=0.25, workers=1)


def _replace(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    value = tuple(value) if isinstance(value, list) else value  # JSON, by which processes are told, has no tuples
    return dataclasses.replace(config, **{path[0]: value})
