"""A comparison: prepares the text, matches the models, and trains and scores each of them.

Every run is trained in a child process, one after another, and scored in another; this process only waits.
Finished parts are stored in the output folder, so a comparison that was stopped can be resumed.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from tttlm.comparison.matching import Match, MatchConfig, cost_of, match
from tttlm.comparison.text import prepared_data, prepared_test, tokenizer_of
from tttlm.errors import InputError
from tttlm.evaluation.positions import PositionsConfig
from tttlm.evaluation.run import run_config
from tttlm.model import parameter_count
from tttlm.ranges import FilePath, OutputPath, Seed
from tttlm.records import write_file
from tttlm.training.checkpoint_files import saved_steps
from tttlm.training.config import TrainConfig, check, to_dict
from tttlm.training.run_folder import RunFolder


@dataclass(frozen=True)
class CompareConfig:
    """Configuration common to all models of a comparison; the models themselves are the file's `models`."""

    output: OutputPath = "runs/compare"
    """The folder that everything is written to; resumed if it exists."""
    data: FilePath = ""
    """Text to train on, files or a folder, or a prepared folder; empty takes train.data."""
    test: FilePath = ""
    """Other text to report on, prepared with the same tokenizer; empty takes the held-out documents of `data`."""
    seeds: tuple[Seed, ...] = (0, 1)
    """Seeds of the initial parameters and of the order of batches; every model is trained once with each."""
    against: Literal["first", "previous"] = "first"
    """The reference of loss differences: the first model, or the previous one."""
    match: MatchConfig = field(default_factory=MatchConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)


@dataclass(frozen=True)
class Entry:
    """One model: its runs, one for each seed.

    Attributes:
        name: the name in the report.
        configs: configurations of the runs; those of given finished runs are read from their folders.
        changed: the changes made by the matching; "" for none.
        given: whether these are finished runs, which are not trained here.
    """

    name: str
    configs: tuple[TrainConfig, ...]
    changed: str = ""
    given: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison whose data is prepared and whose models are matched.

    Attributes:
        config: the configuration common to all models.
        entries: the models, in the order of the report.
        test: the prepared folder whose held-out documents are reported on.
    """

    config: CompareConfig
    entries: tuple[Entry, ...]
    test: Path

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return self.entries[0].configs[0].sequence_length


def decide(
    config: CompareConfig, models: dict[str, TrainConfig], given: dict[str, list[str]], order: list[str]
) -> Comparison:
    """Prepares the text, matches the models, and checks that each of them can be trained.

    Args:
        config: the configuration common to all models.
        models: the models to train, before matching.
        given: finished runs of other models, one folder for each seed.
        order: the names of all models, in the order of the report.

    Raises:
        InputError: the comparison is impossible; raised before anything is trained.
    """
    if not order:
        raise InputError("there is no model to compare: name some under 'models'")
    if odd := [name for name in order if not re.fullmatch(r"[\w.-]+", name)]:
        raise InputError(f"names of models have letters, digits, '.', '-' and '_', got {odd[0]!r}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must be different numbers, at least one, got {list(config.seeds)}")
    finished = {name: tuple(map(finished_run, runs)) for name, runs in given.items()}
    common = _common_run(models, finished)
    picked = matched_models(config.match, models, finished)
    for name, run in models.items():
        check(replace(run, model=picked[name].config, data=replace(run.data, path="to be prepared", mixture={})))
    output = Path(config.output)
    data = prepared_data(config.data, common.data, output / "data") if models else common.data
    entries = {name: Entry(name, runs, given=True) for name, runs in finished.items()}
    for name, run in models.items():
        run = replace(run, model=picked[name].config, data=data, evaluate=replace(run.evaluate, final_bytes=0))
        runs = tuple(replace(run, seed=seed, run=str(output / "runs" / f"{name}-{seed}")) for seed in config.seeds)
        for each in runs:
            _check_same(each)
        entries[name] = Entry(name, runs, picked[name].changed)
    folder = Path(data.validation_path or data.path or next(iter(data.mixture)))
    test = prepared_test(config.test, folder, output / "test") if config.test else folder
    for name, entry in entries.items():
        if (fingerprint := tokenizer_of(entry.configs[0].data)) != tokenizer_of(test):
            raise InputError(
                f"models.{name} was trained with another tokenizer ({fingerprint[:8]}) than {test} was made with"
            )
    return Comparison(config, tuple(entries[name] for name in order), test)


def train_all(comparison: Comparison, train: Callable[[Path], None]) -> None:
    """Trains the unfinished runs: all models with the first seed, then with the next.

    Args:
        train: a function that trains the run whose configuration is in a YAML file.
    """
    waiting = [
        (entry.name, run)
        for i in range(len(comparison.config.seeds))
        for entry in comparison.entries
        if not entry.given
        for run in entry.configs[i : i + 1]
    ]
    took: dict[str, float] = {}
    for number, (name, run) in enumerate(waiting):
        if is_finished(run):
            continue
        left = [took.get(other) for other, later in waiting[number:] if not is_finished(later)]
        measured = [seconds for seconds in left if seconds is not None]
        mean = sum(took.values()) / len(took) if took else None
        message = f"[{number + 1}/{len(waiting)}] {name}, seed {run.seed}"
        if mean is not None:
            message += f" (training ends in about {(sum(measured) + mean * (len(left) - len(measured))) / 60:.0f} min)"
        print(message, file=sys.stderr, flush=True)
        file = Path(run.run).with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True).encode())
        start = time.monotonic()
        train(file)
        took[name] = time.monotonic() - start


def is_finished(run: TrainConfig) -> bool:
    return run.steps in saved_steps(RunFolder(run.run).checkpoints)


def finished_run(path: str) -> TrainConfig:
    """The configuration of a finished run.

    Raises:
        InputError: the path is not a run, or the run is not finished.
    """
    config = replace(run_config(path), run=path)
    if not is_finished(config):
        raise InputError(f"{path} is not finished: it has no checkpoint of step {config.steps}")
    return config


def describe_models(comparison: Comparison) -> Iterator[str]:
    """Yields the lines of a table of the models."""
    by = comparison.config.match.by
    yield f"{'model':24} {'layers':>6} {'hidden size':>11} {'parameters':>11} {'FLOPs/token':>12}  matched"
    for entry in comparison.entries:
        model = entry.configs[0].model
        flops = model.flops_per_token(comparison.length)
        note = "finished run" if entry.given else entry.changed or ("unchanged" if by != "none" else "")
        shape = f"{entry.name:24} {model.num_layers:6} {model.hidden_size:11}"
        yield f"{shape} {parameter_count(model):11,} {flops:12,.0f}  {note}"


def _check_same(run: TrainConfig) -> None:
    """Refuses to resume a run that an earlier comparison started in the same folder with another configuration."""
    try:
        RunFolder(run.run).check_config(run)
    except InputError as error:
        raise InputError(str(error).replace("--run", "--output")) from None


def _common_run(models: dict[str, TrainConfig], given: dict[str, tuple[TrainConfig, ...]]) -> TrainConfig:
    """The run of the first model, after checking that all models read the same batches."""
    everyone = {**models, **{name: runs[0] for name, runs in given.items()}}
    first, run = next(iter(everyone.items()))
    for name, other in everyone.items():
        for what in ("sequence_length", "batch_size", "steps"):
            if getattr(other, what) != getattr(run, what):
                raise InputError(
                    f"models of a comparison read the same batches, but {what} is {getattr(run, what)} for {first} "
                    f"and {getattr(other, what)} for {name}"
                )
        if name in models and first in models and other.data != run.data:
            raise InputError(f"models of a comparison read the same batches, but {first} and {name} differ in data")
    return run


def matched_models(
    settings: MatchConfig, models: dict[str, TrainConfig], given: dict[str, tuple[TrainConfig, ...]]
) -> dict[str, Match]:
    """The models that are trained; matched ones are changed to the cost of `settings.to`."""
    unchanged = {name: Match(run.model, "", 0.0, 0.0) for name, run in models.items()}
    if settings.by == "none":
        return unchanged
    to = models.get(settings.to) or next(iter(given.get(settings.to, ())), None)
    if to is None:
        raise InputError(f"match.to names one of the models ({', '.join([*models, *given])}), got {settings.to!r}")
    target = cost_of(to.model, settings.by, to.sequence_length)
    return unchanged | {
        name: match(run.model, target, settings, run.sequence_length, name)
        for name, run in models.items()
        if name != settings.to
    }
