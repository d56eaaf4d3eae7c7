"""Models beside each other: trains each on the same batches, scores each on the same text, writes one report.

python -m tttlm.cli.compare configs/compare/small.yaml --data FOLDER [--test FOLDER] [--output FOLDER]

The file has what all models share (`train`, the names of train.py) and, under `models`, what differs in each; `run`
there names a finished run, or a list of them, instead. On the command line --train.NAME VALUE changes it for all models
and --models.MODEL.NAME VALUE for one. Stopped, the same command goes on.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttlm.cli.arguments import as_flags, merged, parse, read_config, run_command
from tttlm.errors import InputError

if TYPE_CHECKING:  # they import JAX, which reads the environment that `main` sets
    from tttlm.evaluation.comparison import CompareConfig
    from tttlm.training.config import TrainConfig

PROGRAM = "python -m tttlm.cli.compare"


def main(arguments: Sequence[str]) -> int:
    """A comparison; the words `train` and `score` in front are how it calls itself for the parts."""
    words = list(arguments)
    if words[:1] == ["train"]:
        return _train(words[1])
    if words[:1] == ["score"]:
        return _score(words[1])
    environment = dict(os.environ)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only looks on; the devices are for its children
    return _compare(words, environment)


def read_comparison(
    words: Sequence[str],
) -> "tuple[CompareConfig, dict[str, TrainConfig], dict[str, list[str]], list[str]]":
    """What a file and flags say: what is shared, the models to train, finished runs, and all names in order.

    Raises:
        InputError: in one line, for what cannot be read or meant.
    """
    from tttlm.evaluation.comparison import CompareConfig
    from tttlm.training.config import TrainConfig

    named = bool(words) and not words[0].startswith("-")
    file, flags = (words[0], list(words[1:])) if named else (None, list(words))
    if {"-h", "--help"} & set(flags):
        parse(CompareConfig, ["--help"], prog=PROGRAM, description=__doc__ or "")
    if file is None:
        raise InputError(f"name a configuration, for example: {PROGRAM} configs/compare/small.yaml --data FOLDER")
    values = _with_bases(read_config(file), Path(file))
    shared, models = values.pop("train"), values.pop("models")
    own, for_train, for_model = _sorted_flags(flags, models)
    config = parse(CompareConfig, [*as_flags(CompareConfig, values, file), *own], prog=PROGRAM)
    to_train: dict[str, TrainConfig] = {}
    given: dict[str, list[str]] = {}
    for name, differences in models.items():
        if not isinstance(differences, dict):
            raise InputError(f"{file}: 'models.{name}' holds what differs in it, got {differences!r}")
        if set(differences) == {"run"} and not for_model[name]:
            runs = differences["run"]
            given[name] = [runs] if isinstance(runs, str) else list(map(str, runs))
            continue
        of_all = [*as_flags(TrainConfig, shared, f"{file}: train"), *for_train]
        its_own = [*as_flags(TrainConfig, differences, f"{file}: models.{name}"), *for_model[name]]
        to_train[name] = parse(TrainConfig, [*of_all, *its_own], prog=f"{PROGRAM}: models.{name}")
    return config, to_train, given, list(models)


def _compare(words: list[str], environment: dict[str, str]) -> int:
    from tttlm.evaluation.children import note_peak, run_child
    from tttlm.evaluation.comparison import decide, describe_models, train_all
    from tttlm.evaluation.report import results_table, write_report
    from tttlm.evaluation.results import read_results
    from tttlm.evaluation.scores import scoring_job

    config, to_train, given, order = read_comparison(words)
    output = Path(config.output)
    comparison = decide(config, to_train, given, order)
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "compiled").absolute()))
    print("\n".join(describe_models(comparison)), file=sys.stderr)

    def child(*parts: str) -> int:
        status, peak = run_child(["-m", "tttlm.cli.compare", *parts], environment)
        if status:
            raise SystemExit(status if status > 0 else 128 - status)
        return peak

    def train(file: Path) -> None:
        note_peak(file.with_suffix(""), child("train", str(file)))

    train_all(comparison, train)
    if job := scoring_job(comparison):
        child("score", str(job))
    command = " ".join([PROGRAM, *words])
    results = read_results(comparison)
    report = write_report(comparison, results, command, output / "report")
    print("\n".join(results_table(comparison, results)), report, sep="\n\n")
    return 0


def _sorted_flags(words: list[str], models: dict[str, Any]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The flags of the comparison, those of `--train.`, and those of `--models.MODEL.`, without their prefix."""
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


def _with_bases(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """`base` works within `train` and each model as it does at the top of a file."""

    def expanded(part: Any) -> Any:
        if not isinstance(part, dict) or "base" not in part:
            return part
        bases = [part["base"]] if isinstance(part["base"], str) else part["base"]
        rest = {name: value for name, value in part.items() if name != "base"}
        read: dict[str, Any] = {}
        for base in bases:
            read = merged(read, read_config(file.parent / base))
        read.pop("run", None)  # the folder of a run is the comparison's to choose
        return merged(read, rest)

    for name in ("train", "models"):
        if not isinstance(values.get(name, {}), dict):
            raise InputError(f"{file}: '{name}' holds further keys, got {values[name]!r}")
    models = {str(name): expanded(part) for name, part in values.get("models", {}).items()}
    return {**values, "train": expanded(values.get("train", {})), "models": models}


def _train(file: str) -> int:
    """Trains the run whose configuration is in a file, and no more."""
    import yaml

    from tttlm.evaluation.children import end_with_parent
    from tttlm.training.config import TrainConfig, from_dict
    from tttlm.training.loop import train

    end_with_parent()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    outcome = train(from_dict(TrainConfig, yaml.safe_load(Path(file).read_text(encoding="utf-8"))))
    if outcome.reason != "finished":
        print(outcome.message, file=sys.stderr)
    return outcome.status


def _score(file: str) -> int:
    """Scores the runs of a job."""
    from tttlm.evaluation.children import end_with_parent
    from tttlm.evaluation.scores import do_scoring_job

    end_with_parent()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    do_scoring_job(Path(file))
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
