"""A comparison: prepares the text, matches the models, and trains and scores each of them.

Every run is trained in a child process, `jobs` of them at a time, and all are scored in another; this process only
waits. Finished parts are stored in the output folder, so a comparison that was stopped can be resumed.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from tttlm.comparison.matching import Match, MatchConfig, cost_of, match
from tttlm.comparison.sweep import SweepConfig, Swept, best, check_sweep, runs_of_sweep, swept
from tttlm.comparison.text import prepared_data, prepared_test, tokenizer_of
from tttlm.data import DataConfig
from tttlm.errors import InputError
from tttlm.evaluation.positions import PositionsConfig
from tttlm.evaluation.run import run_config
from tttlm.fields import refuse_unused
from tttlm.model import parameter_count
from tttlm.ranges import Count, FilePath, OutputPath, Range, Seed
from tttlm.records import write_file
from tttlm.training.checkpoint_files import saved_steps
from tttlm.training.config import TrainConfig, check, differences, to_dict
from tttlm.training.run_folder import RunFolder


@dataclass(frozen=True)
class AnswersConfig:
    """Configuration of the sequences that models of generated data are scored on (`train.data.generated`)."""

    lengths: tuple[Annotated[int, Range(least=6, most=1 << 24)], ...] = ()
    """Lengths in tokens; none takes those of training."""
    samples: Count = 128
    """Number of sequences of each task and length."""


@dataclass(frozen=True)
class CompareConfig:
    """Configuration common to all models of a comparison; the models themselves are the file's `models`."""

    output: OutputPath = "runs/compare"
    """The folder that everything is written to; resumed if it exists."""
    data: FilePath = ""
    """Text to train on, files or a folder, or a prepared folder; empty takes train.data."""
    held_out: FilePath = ""
    """Other text for curves and the sweep, prepared with the same tokenizer; empty takes the held-out documents of
    `data`."""
    test: FilePath = ""
    """Other text to report on, prepared with the same tokenizer; empty takes that of curves and the sweep."""
    jobs: Count = 1
    """Number of runs that are trained at the same time, on the same devices; the times of more than one cannot be
    compared."""
    seeds: tuple[Seed, ...] = (0, 1)
    """Seeds of the initial parameters and of the order of batches; every model is trained once with each."""
    against: Literal["first", "previous"] = "first"
    """The reference of loss differences: the first model, or the previous one."""
    match: MatchConfig = field(default_factory=MatchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)


@dataclass(frozen=True)
class Entry:
    """One model: its runs, one for each seed.

    Attributes:
        name: the name in the report.
        configs: configurations of the runs; those of given finished runs are read from their folders.
        changed: the changes made by the matching; "" for none.
        given: whether these are finished runs, which are not trained here.
        swept: the results of the sweep of learning rates; () if there was none.
    """

    name: str
    configs: tuple[TrainConfig, ...]
    changed: str = ""
    given: bool = False
    swept: tuple[Swept, ...] = ()

    @property
    def shape(self) -> dict[str, Any]:
        """Number of layers, hidden size, heads, intermediate size, mixers and the changes made by the matching."""
        model = self.configs[0].model
        names = ("num_layers", "hidden_size", "num_heads", "intermediate_size")
        return {name: getattr(model, name) for name in names} | {"mixers": list(model.mixers), "changed": self.changed}


@dataclass(frozen=True)
class Comparison:
    """A comparison whose data is prepared and whose models are matched.

    Attributes:
        config: the configuration common to all models.
        entries: the models, in the order of the report.
        test: the prepared folder whose held-out documents are reported on; None for generated data.
    """

    config: CompareConfig
    entries: tuple[Entry, ...]
    test: Path | None

    @property
    def generated(self) -> bool:
        """Whether the models are trained on generated sequences and scored by their answers."""
        return bool(self.entries[0].configs[0].data.generated.tasks)

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
    if not models:
        refuse_unused(config, "where all models are finished runs", "data", "held_out")
    finished = {name: finished_runs(name, runs) for name, runs in given.items()}
    common = _common_run(models, finished)
    picked = matched_models(config.match, models, finished)
    generated = bool(common.data.generated.tasks)
    for name, run in models.items():
        check_sweep(config.sweep, run)
        text = run.data if generated else replace(run.data, path="to be prepared", mixture={})
        check(replace(run, model=picked[name].config, data=text))
    if not generated:
        refuse_unused(config, "without train.data.generated", "answers")
    output = Path(config.output)
    data = prepared_data(config.data, common.data, output / "data") if models else common.data
    test = None if generated else _folder_of(data)
    if generated and (named := config.held_out or config.test):
        raise InputError(f"models of generated sequences are not scored on text: leave out {named}")
    if test is not None and config.held_out and models:
        test = prepared_test(config.held_out, test, output / "held_out")
        data = replace(data, validation_path=str(test))
    entries = {name: Entry(name, runs, given=True) for name, runs in finished.items()}
    for name, run in models.items():
        run = replace(run, model=picked[name].config, data=data, evaluate=replace(run.evaluate, final_bytes=0))
        runs = tuple(replace(run, seed=seed, run=str(output / "runs" / f"{name}-{seed}")) for seed in config.seeds)
        entries[name] = Entry(name, runs, picked[name].changed)
    comparison = Comparison(config, tuple(entries[name] for name in order), test)
    for _, each in sweep_runs(comparison) if config.sweep.learning_rates else runs_of(comparison):
        check(each)
        _check_same(each)
    if test is None:
        return comparison
    if config.test:
        test = prepared_test(config.test, test, output / "test")
    for name, entry in entries.items():
        others = [found for run in entry.configs if (found := tokenizer_of(run.data)) != tokenizer_of(test)]
        if others:
            raise InputError(
                f"models.{name} was trained with another tokenizer ({others[0][:8]}) than {test} was made with: "
                "name text that is not prepared yet, or prepare it with the tokenizer of that run"
            )
    return replace(comparison, test=test)


def runs_of(comparison: Comparison) -> list[tuple[str, TrainConfig]]:
    """(label, run) of the runs that are compared: all models with the first seed, then with the next."""
    return [
        (f"{entry.name}, seed {run.seed}", run)
        for i in range(len(comparison.config.seeds))
        for entry in comparison.entries
        if not entry.given
        for run in entry.configs[i : i + 1]
    ]


def sweep_runs(comparison: Comparison) -> list[tuple[str, TrainConfig]]:
    """(label, run) of the runs of the sweep."""
    return [
        (f"{entry.name}, learning rate {run.optimizer.learning_rate:g}", run)
        for entry in comparison.entries
        for run in _sweep_of(comparison, entry)
    ]


def with_best_rates(comparison: Comparison) -> Comparison:
    """The comparison in which every model has the learning rate that was best in the sweep.

    Raises:
        InputError: runs were started in the same folder with other rates.
    """
    entries = []
    for entry in comparison.entries:
        if results := swept(_sweep_of(comparison, entry)):
            rate = best(results).learning_rate
            configs = [replace(run, optimizer=replace(run.optimizer, learning_rate=rate)) for run in entry.configs]
            if not comparison.config.sweep.steps:  # the run of the first seed is in the sweep
                configs[:1] = [run for run in _sweep_of(comparison, entry) if run.optimizer.learning_rate == rate][:1]
            entry = replace(entry, configs=tuple(configs), swept=results)
        entries.append(entry)
    comparison = replace(comparison, entries=tuple(entries))
    for _, run in runs_of(comparison):
        _check_same(run)
    return comparison


def _sweep_of(comparison: Comparison, entry: Entry) -> Iterator[TrainConfig]:
    if not entry.given:
        folder = Path(comparison.config.output) / "sweep"
        yield from runs_of_sweep(comparison.config.sweep, entry.configs[0], entry.name, folder)


def train_all(
    runs: Sequence[tuple[str, TrainConfig]], train: Callable[[Iterable[Path]], Iterable[Path]], jobs: int = 1
) -> None:
    """Trains the unfinished ones of some runs.

    Args:
        runs: (label, run) of each.
        train: a function that trains the runs whose configurations are in YAML files, taking a file when it can start,
            and gives each file back when its run is finished.
        jobs: the number of runs that it trains at the same time.
    """
    took: list[float] = []
    began: dict[Path, float] = {}

    def files() -> Iterator[Path]:
        for number, (label, run) in enumerate(runs):
            if is_finished(run):
                continue
            left = sum(not is_finished(later) for _, later in runs[number:])
            message = f"[{number + 1}/{len(runs)}] {label}"
            if took:
                message += f" (training ends in about {sum(took) / len(took) * left / jobs / 60:.0f} min)"
            print(message, file=sys.stderr, flush=True)
            file = Path(f"{run.run}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True).encode())
            began[file] = time.monotonic()
            yield file

    for file in train(files()):
        took.append(time.monotonic() - began[file])


def is_finished(run: TrainConfig) -> bool:
    return run.steps in saved_steps(RunFolder(run.run).checkpoints)


def finished_run(path: str) -> TrainConfig:
    """The configuration of a finished run.

    Raises:
        InputError: the path is not a run, or the run is not finished.
    """
    config = replace(run_config(path), run=path)
    if not is_finished(config):
        raise InputError(
            f"{path} is not finished: it has no checkpoint of step {config.steps}; resume it with its command"
        )
    return config


def finished_runs(name: str, paths: list[str]) -> tuple[TrainConfig, ...]:
    """The configurations of a model's finished runs, which may differ in their seeds and the paths of their data.

    Raises:
        InputError: as `finished_run`; a run is named twice, or the runs are of other models or trainings.
    """
    runs = tuple(map(finished_run, paths))
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"models.{name} names a run twice: {', '.join(paths)}")
    for run in runs[1:]:
        if changed := differences(to_dict(runs[0]), replace(run, seed=runs[0].seed, data=runs[0].data)):
            raise InputError(
                f"models.{name} names runs that differ in more than their seeds, {paths[0]} and {run.run} "
                f"({'; '.join(changed)}): make a model of each"
            )
    return runs


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


def _folder_of(data: DataConfig) -> Path:
    return Path(data.validation_path or data.path or next(iter(data.mixture)))


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
                    f"and {getattr(other, what)} for {name}: make them equal"
                )
        same = other.data == run.data if {name, first} <= models.keys() else other.data.generated == run.data.generated
        if not same:
            raise InputError(
                f"models of a comparison read the same batches, but {first} and {name} differ in their `data`: "
                "make these sections equal"
            )
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
