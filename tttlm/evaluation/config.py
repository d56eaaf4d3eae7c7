"""What is evaluated, and how; the configuration of `eval.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from tttlm.adaptation.language_model import DynamicConfig
from tttlm.ranges import Count, CountOrZero, FilePath, PositiveFloat, Range, Seed
from tttlm.training.config import MeshConfig

Task = Literal["loss", "positions", "recall"]
RecallTask = Literal["passkey", "needle", "needles", "distractors", "mqar", "copy"]


@dataclass(frozen=True)
class ByPositionConfig:
    """Loss by the position of a token in its document."""

    protocols: tuple[Literal["windows", "stream", "reset_every"], ...] = ("windows", "stream", "reset_every")
    """windows: non-overlapping windows, each from a fresh state. stream: a document from its start. reset_every: the
    same tokens with the state reset every so many."""
    windows: tuple[Count, ...] = (2048,)
    """Tokens of a window, one protocol for each."""
    reset_every: tuple[Count, ...] = (2048,)
    """Tokens after which the state is reset, one protocol for each."""
    length: CountOrZero = 0
    """Tokens of a document that are read at most; 0 reads all of it."""
    resamples: Annotated[int, Range(least=100, most=100_000)] = 1000
    """Draws of documents for the confidence intervals."""


@dataclass(frozen=True)
class RecallConfig:
    """What is said once and asked for later."""

    tasks: tuple[RecallTask, ...] = ("passkey", "needle", "needles", "distractors")
    """passkey, needle, needles (four, all asked for) and distractors (one of five) are put into the texts; mqar (keys
    and values) and copy are made of random tokens."""
    lengths: tuple[Count, ...] = (1024, 2048)
    """Tokens of a sequence; of mqar and copy as many as fit into it."""
    depths: tuple[Annotated[float, Range(least=0, most=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the haystack the needle is: 0 is the start, 1 the end."""
    samples: Count = 10
    """Sequences of each task, length and depth."""


@dataclass(frozen=True)
class InnerConfig:
    """The inner models of TTT layers, another way than they were trained."""

    mini_batch_size: CountOrZero = 0
    """Tokens of an inner step; 0 as in training."""
    learning_rate: PositiveFloat = 1.0
    """What the inner learning rate is multiplied by."""


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated."""

    models: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """Folders of runs or of released models."""
    task: tuple[Task, ...] = ("loss",)
    """What is measured."""
    text: tuple[FilePath, ...] = ()
    """Text files, folders of them or globs; each file is a document. None takes the held-out documents of the first
    run."""
    output: FilePath = ""
    """The folder to write results.json, results.csv and pictures to, and to go on from; empty prints only."""
    tokenizer: FilePath = ""
    """For released models without a tokenizer beside them: a tokenizer file, a folder with one, or "bytes"."""
    step: CountOrZero | None = None
    """The checkpoint of runs; None is the newest."""
    limit: CountOrZero = 0
    """Bytes of held-out text to score, in whole documents; 0 scores all of it."""
    rows: Count = 8
    """Documents that are read side by side."""
    chunk: CountOrZero = 0
    """Tokens of a document that are read at a time; 0 is what suits the texts."""
    max_length: CountOrZero = 0
    """Tokens that attention has room for; 0 is as many as the texts take."""
    positions: ByPositionConfig = field(default_factory=ByPositionConfig)
    """With --task positions."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """With --task recall."""
    inner: InnerConfig = field(default_factory=InnerConfig)
    """Changes of the inner models."""
    adapt: DynamicConfig = field(default_factory=DynamicConfig)
    """Dynamic evaluation, with a learning rate above 0: --task loss scores once more while the model learns from each
    stretch of text after it was scored on it."""
    seed: Seed = 0
    """Seed of recall tasks and of confidence intervals."""
    json: bool = False
    """Print JSON instead of tables."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1))
    """Devices that each model is sharded over."""
