"""The configuration of an evaluation (`eval.py`)."""

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
    """Configuration of the loss by the position of a token in its document."""

    protocols: tuple[Literal["windows", "stream", "reset_every"], ...] = ("windows", "stream", "reset_every")
    """windows: non-overlapping windows, each from the initial state. stream: a document from its start. reset_every:
    the same tokens with the state reset at fixed intervals."""
    windows: tuple[Count, ...] = (2048,)
    """Lengths of windows in tokens, one protocol for each."""
    reset_every: tuple[Count, ...] = (2048,)
    """Intervals in tokens at which the state is reset, one protocol for each."""
    length: CountOrZero = 0
    """Largest number of tokens of a document; 0 reads all of them."""
    resamples: Annotated[int, Range(least=100, most=100_000)] = 1000
    """Number of bootstrap resamples for the confidence intervals."""


@dataclass(frozen=True)
class RecallConfig:
    """Configuration of recall tasks."""

    tasks: tuple[RecallTask, ...] = ("passkey", "needle", "needles", "distractors")
    """passkey, needle, needles (four, all asked for) and distractors (one of five) are put into the texts; mqar (keys
    and values) and copy are made of random tokens."""
    lengths: tuple[Annotated[int, Range(least=6, most=1 << 24)], ...] = (1024, 2048)
    """Lengths of sequences in tokens; mqar and copy have as many pairs or tokens as fit."""
    depths: tuple[Annotated[float, Range(least=0, most=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Relative positions of the needle in the haystack: 0 is the start, 1 the end."""
    samples: Count = 10
    """Number of sequences of each task, length and depth."""


@dataclass(frozen=True)
class InnerConfig:
    """Changes of the inner models of TTT layers with respect to training."""

    mini_batch_size: CountOrZero = 0
    """Inner mini-batch size in tokens; 0 as in training."""
    learning_rate: PositiveFloat = 1.0
    """Multiplier of the inner learning rate."""


@dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation."""

    models: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """Folders of runs or of released models."""
    task: tuple[Task, ...] = ("loss",)
    """What is measured: loss, loss by position, recall from the context; one or several."""
    text: tuple[FilePath, ...] = ()
    """Text files, folders of them or globs; each file is a document. Without any, the held-out documents of the
    first run are read."""
    output: FilePath = ""
    """The folder for results.json, results.csv and pictures; a stopped evaluation resumes there. Empty only prints."""
    tokenizer: FilePath = ""
    """For released models without a tokenizer in their folder: a tokenizer file, a folder with one, or "bytes"."""
    step: CountOrZero | None = None
    """The checkpoint of runs; None is the newest."""
    limit: CountOrZero = 0
    """Bytes of held-out text to score, in complete documents; 0 scores all of it."""
    batch_size: Count = 8
    """Number of documents that are read in parallel; it changes no result."""
    chunk: CountOrZero = 0
    """Number of tokens of a document that are read at a time, which changes no result; 0 chooses by the texts."""
    max_length: CountOrZero = 0
    """Length in tokens of the caches of attention; 0 takes that of the longest text."""
    positions: ByPositionConfig = field(default_factory=ByPositionConfig)
    """Configuration of --task positions."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """Configuration of --task recall."""
    inner: InnerConfig = field(default_factory=InnerConfig)
    """Changes of the inner models."""
    adapt: DynamicConfig = field(default_factory=DynamicConfig)
    """Dynamic evaluation, with a learning rate above 0: --task loss also scores the model while it learns from each
    stretch of text after it was scored on it."""
    seed: Seed = 0
    """Seed of recall tasks and of confidence intervals."""
    json: bool = False
    """Print JSON instead of tables."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1))
    """Number of devices that each model is sharded over."""
