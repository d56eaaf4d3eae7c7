"""Compares models: trains each on the same batches, scores each on the same text, writes a report.

python -m tttlm.cli.compare configs/compare/small.yaml --data FOLDER [--test FOLDER] [--output FOLDER]

The file has the configuration common to all models (`train`, the fields of train.py) and, under `models`, the
differences of each; `run` there names a finished run, or a list of them, instead. On the command line --train.NAME
VALUE changes a field for all models and --models.MODEL.NAME VALUE for one. After an interruption the same command
resumes.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlm.cli.arguments import find_config, parse, program, read_section, run_command, split_bases
from tttlm.cli.faults import INTERRUPTED, TERMINATED
from tttlm.errors import InputError
from tttlm.fields import from_values, read_fields
from tttlm.records import shown
from tttlm.yaml_file import read_yaml

if TYPE_CHECKING:  # they import JAX, which reads the environment that `main` sets
    from tttlm.comparison.experiment import CompareConfig
    from tttlm.training.config import TrainConfig

PROGRAM = "python -m tttlm.cli.compare"


def main(arguments: Sequence[str]) -> int:
    """Runs a comparison; it calls itself with `train` or `score` as the first argument for the parts."""
    words = list(arguments)
    if words[:1] == ["train"]:
        return _train(words[1])
    if words[:1] == ["score"]:
        return _score(words[1])
    environment = dict(os.environ)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only waits; the devices are for its children
    return _compare(words, environment)


@dataclass
class _Parts:
    """The values in a file and its bases, for the comparison, all models, and each model; dotted name -> value."""

    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_comparison(
    words: Sequence[str],
) -> "tuple[CompareConfig, dict[str, TrainConfig], dict[str, list[str]], list[str]]":
    """Reads a file and flags: the common configuration, the models to train, finished runs, and all names in order.

    Raises:
        InputError: the file cannot be read, or the configuration is invalid.
    """
    from tttlm.comparison.experiment import CompareConfig
    from tttlm.training.config import TrainConfig

    named = bool(words) and not words[0].startswith("-")
    file, flags = (words[0], list(words[1:])) if named else (None, list(words))
    if asked := [flag for flag in flags if flag in ("-h", "--help") or flag.startswith("--tyro-")]:
        rest = flags[flags.index(asked[0]) :]
        parse(CompareConfig, rest, prog=program(PROGRAM), description=__doc__ or "")
    if file is None:
        raise InputError(f"name a configuration, for example: {PROGRAM} configs/compare/small.yaml --data FOLDER")
    parts = _read_parts(find_config(file))
    own, for_train, for_model = _sorted_flags(flags, list(parts.models))
    config = parse(CompareConfig, own, prog=PROGRAM, values=parts.own)
    to_train: dict[str, TrainConfig] = {}
    given: dict[str, list[str]] = {}
    for name, differences in parts.models.items():
        if differences.keys() == {_FINISHED} and not for_model[name]:
            given[name] = differences[_FINISHED]
            continue
        values = {**parts.shared, **differences}
        values.pop(_FINISHED, None)
        flags = [*for_train, *for_model[name]]
        to_train[name] = parse(TrainConfig, flags, prog=f"{PROGRAM}: models.{name}", values=values)
    return config, to_train, given, list(parts.models)


_FINISHED = "run"  # the key for finished runs of a model; the comparison chooses the folders of the others


def _read_parts(file: Path, inside: tuple[Path, ...] = ()) -> _Parts:
    """Reads a file; `base` is allowed at its top, within `train` and within each model."""
    from tttlm.comparison.experiment import CompareConfig
    from tttlm.training.config import TrainConfig

    values, bases = split_bases(read_yaml(file), file, str(file), inside)
    if not isinstance(values or {}, dict):
        raise InputError(f"{file}: expected 'key: value' lines, got {shown(values)}")
    values = dict(values or {})
    whole = _Parts()
    for base in bases:
        part = _read_parts(base, (*inside, file.resolve()))
        whole.own |= part.own
        whole.shared |= part.shared
        for name, differences in part.models.items():
            whole.models[name] = {**whole.models.get(name, {}), **differences}
    shared, models = values.pop("train", None), values.pop("models", None) or {}
    if not isinstance(models, dict):
        raise InputError(f"{file}: 'models' is a section with keys, got {shown(models)}")
    whole.own |= read_fields(CompareConfig, values, str(file))
    whole.shared |= read_section(TrainConfig, shared, file, f"{file}: train")
    whole.shared.pop("run", None)
    for name, differences in models.items():
        source = f"{file}: models.{shown(name, quote=False)}"
        finished = differences.pop("run", None) if isinstance(differences, dict) else None
        read = read_section(TrainConfig, differences, file, source)
        read.pop("run", None)
        if finished is not None:
            runs = [finished] if isinstance(finished, str) else finished
            if not isinstance(runs, list) or not runs or not all(isinstance(run, str) and run for run in runs):
                raise InputError(f"{source}: 'run' names a finished run or a list of them, got {shown(finished)}")
            read[_FINISHED] = [str(Path(run).expanduser()) for run in runs]
        whole.models[name] = {**whole.models.get(name, {}), **read}
    return whole


def _compare(words: list[str], environment: dict[str, str]) -> int:
    from tttlm.comparison.children import note_process, run_child, run_children
    from tttlm.comparison.experiment import decide, describe_models, runs_of, sweep_runs, train_all, with_best_rates
    from tttlm.data.finding import printable

    config, to_train, given, order = read_comparison(words)
    output = Path(config.output)
    comparison = decide(config, to_train, given, order)
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "compiled").absolute()))
    print("\n".join(describe_models(comparison)), file=sys.stderr)

    def train(files: Iterable[Path]) -> Iterator[Path]:
        started: list[Path] = []

        def commands() -> Iterator[list[str]]:
            for file in files:
                started.append(file)
                yield ["-m", "tttlm.cli.compare", "train", str(file)]

        with closing(run_children(commands(), environment, config.jobs)) as ended:
            for number, status, peak in ended:
                _check_status(status)
                note_process(started[number].with_suffix(""), peak, config.jobs)
                yield started[number]

    def score(job: Path) -> None:
        status, _ = run_child(["-m", "tttlm.cli.compare", "score", str(job)], environment)
        _check_status(status)

    if config.sweep.learning_rates:
        train_all(sweep_runs(comparison), train, config.jobs)
        comparison = with_best_rates(comparison)
    train_all(runs_of(comparison), train, config.jobs)
    command = printable(" ".join([PROGRAM, *words]))
    if comparison.generated:
        from tttlm.comparison.answers import unscored, write_answers_report

        if job := unscored(comparison):
            score(job)
        report = write_answers_report(comparison, command, output / "report")
        print(report.read_text(encoding="utf-8"), report, sep="\n")
        return 0
    from tttlm.comparison.report import results_table, write_report
    from tttlm.comparison.results import read_results
    from tttlm.comparison.scores import scoring_job

    if job := scoring_job(comparison):
        score(job)
    results = read_results(comparison)
    report = write_report(comparison, results, command, output / "report")
    print("\n".join(results_table(comparison, results)), report, sep="\n\n")
    return 0


def _check_status(status: int) -> None:
    """Exits with the status of a child that failed."""
    early = {-signal.SIGTERM: TERMINATED, -signal.SIGINT: INTERRUPTED}  # before it could answer the signal itself
    if status:
        raise SystemExit(early.get(status, status if status > 0 else 128 - status))


def _sorted_flags(words: list[str], models: list[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The flags of the comparison, of `--train.`, and of `--models.MODEL.`, without their prefix."""
    own: list[str] = []
    for_train: list[str] = []
    for_model: dict[str, list[str]] = {name: [] for name in models}
    target = own
    for word in words:
        if word.startswith("--train."):
            target, word = for_train, "--" + word.removeprefix("--train.")
        elif word.startswith("--models."):
            name, _, rest = word.removeprefix("--models.").partition(".")
            if name not in models:
                raise InputError(f"{PROGRAM}: unknown model {name!r} in {word!r}; there are {', '.join(models)}")
            target, word = for_model[name], f"--{rest}"
        elif word.startswith("--"):
            target = own
        target.append(word)
    return own, for_train, for_model


def _train(file: str) -> int:
    """Trains the run whose configuration is in a file."""
    from tttlm.comparison.children import end_with_parent
    from tttlm.training.config import TrainConfig
    from tttlm.training.loop import train

    end_with_parent()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    outcome = train(from_values(TrainConfig, read_yaml(file), file))
    if outcome.reason != "finished":
        print(outcome.message, file=sys.stderr)
    return outcome.status


def _score(file: str) -> int:
    """Scores the runs of a job."""
    from tttlm.comparison.answers import do_answers_job
    from tttlm.comparison.children import end_with_parent
    from tttlm.comparison.scores import do_scoring_job

    end_with_parent()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    (do_answers_job if Path(file).parent.name == "answers" else do_scoring_job)(Path(file))
    return 0


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="finished runs and checkpoints are kept: the same command resumes")


if __name__ == "__main__":
    run()
