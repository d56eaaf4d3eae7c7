"""What a comparison is, and its work: prepare the text, match the models, train each, score each, write the report.

Every run is trained in a process of its own, one after the other, and scored in another; this process only looks on.
Everything that was finished is found again in the folder, so a comparison that was stopped goes on.
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
    """What all models of a comparison share; the models themselves are the file's `models`."""

    output: OutputPath = "runs/compare"
    """The folder that everything is written to; resumed if it exists."""
    data: FilePath = ""
    """Text to train on, files or a folder, or a folder that was prepared; empty: what train.data says."""
    test: FilePath = ""
    """Other text to report on, prepared with the same tokenizer; empty: what of `data` is held out."""
    seeds: tuple[Seed, ...] = (0, 1)
    """Every model is trained once with each: its initial weights and the order of the batches."""
    against: Literal["first", "previous"] = "first"
    """What a model's loss is subtracted from: the first model's, or that of the one before it."""
    match: MatchConfig = field(default_factory=MatchConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)


@dataclass(frozen=True)
class Entry:
    """One model: its runs, one for each seed.

    Attributes:
        name: in the report.
        configs: of the runs. Those of finished runs that were given are read from their folders.
        changed: what the matching changed, empty for nothing.
        given: whether these are finished runs, which are not trained here.
    """

    name: str
    configs: tuple[TrainConfig, ...]
    changed: str = ""
    given: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison with everything decided.

    Attributes:
        config: what the models share.
        entries: the models, in the order of the report.
        test: the prepared folder whose held-out documents are reported on.
    """

    config: CompareConfig
    entries: tuple[Entry, ...]
    test: Path

    @property
    def length(self) -> int:
        """Tokens of a row that the models are trained on."""
        return self.entries[0].configs[0].sequence_length


def decide(
    config: CompareConfig, models: dict[str, TrainConfig], given: dict[str, list[str]], order: list[str]
) -> Comparison:
    """Prepares the text, matches the models, and checks that each of them can be trained.

    Args:
        config: what they share.
        models: the models to train, before matching.
        given: finished runs of other models, one folder for each seed.
        order: all their names, as they stand in the report.

    Raises:
        InputError: in one line, before anything is trained.
    """
    if not order:
        raise InputError("there is no model to compare: name some under 'models'")
    if odd := [name for name in order if not re.fullmatch(r"[\w.-]+", name)]:
        raise InputError(f"a model is called by letters, digits, '.', '-' and '_', got {odd[0]!r}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must be different numbers, at least one, got {list(config.seeds)}")
    finished = {name: tuple(map(finished_run, runs)) for name, runs in given.items()}
    shared = _what_all_share(models, finished)
    picked = matched_models(config.match, models, finished)
    for name, run in models.items():
        check(replace(run, model=picked[name].config, data=replace(run.data, path="to be prepared", mixture={})))
    output = Path(config.output)
    data = prepared_data(config.data, shared.data, output / "data") if models else shared.data
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
        if (came := tokenizer_of(entry.configs[0].data)) != tokenizer_of(test):
            raise InputError(f"models.{name} was trained with another tokenizer ({came[:8]}) than {test} was made with")
    return Comparison(config, tuple(entries[name] for name in order), test)


def train_all(comparison: Comparison, train: Callable[[Path], None]) -> None:
    """Trains what is not finished yet: all models with the first seed, then with the next.

    Args:
        train: trains the run whose configuration is in a YAML file.
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
        known = [seconds for seconds in left if seconds is not None]
        mean = sum(took.values()) / len(took) if took else None
        say = f"[{number + 1}/{len(waiting)}] {name}, seed {run.seed}"
        if mean is not None:
            say += f" (training ends in about {(sum(known) + mean * (len(left) - len(known))) / 60:.0f} min)"
        print(say, file=sys.stderr, flush=True)
        file = Path(run.run).with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True).encode())
        begun = time.monotonic()
        train(file)
        took[name] = time.monotonic() - begun


def is_finished(run: TrainConfig) -> bool:
    return run.steps in saved_steps(RunFolder(run.run).checkpoints)


def finished_run(path: str) -> TrainConfig:
    """The configuration of a run that was trained to its end.

    Raises:
        InputError: it is no run, or not finished.
    """
    config = replace(run_config(path), run=path)
    if not is_finished(config):
        raise InputError(f"{path} is not finished: it has no checkpoint of step {config.steps}")
    return config


def describe_models(comparison: Comparison) -> Iterator[str]:
    """A table of what will be trained."""
    by = comparison.config.match.by
    yield f"{'model':24} {'layers':>6} {'width':>6} {'parameters':>11} {'FLOPs/token':>12}  matched"
    for entry in comparison.entries:
        model = entry.configs[0].model
        flops = model.flops_per_token(comparison.length)
        note = "finished run" if entry.given else entry.changed or ("as it is" if by != "none" else "")
        shape = f"{entry.name:24} {model.num_layers:6} {model.hidden_size:6}"
        yield f"{shape} {parameter_count(model):11,} {flops:12,.0f}  {note}"


def _check_same(run: TrainConfig) -> None:
    """Refuses to take up a run that an earlier comparison in the same folder began otherwise."""
    try:
        RunFolder(run.run).check_config(run)
    except InputError as error:
        raise InputError(str(error).replace("--run", "--output")) from None


def _what_all_share(models: dict[str, TrainConfig], given: dict[str, tuple[TrainConfig, ...]]) -> TrainConfig:
    """The first model's run, once all are known to read the same batches."""
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
    """The models as they are trained: those that are matched, changed to cost what `settings.to` costs."""
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
