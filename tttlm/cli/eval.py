"""`eval.py`: measures loss, loss by position and recall of runs and released models."""

import json
import logging
import sys
from pathlib import Path

from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import InputError
from tttlm.evaluation.config import EvalConfig
from tttlm.fields import field_values, refuse_unused
from tttlm.records import write_file

DESCRIPTION = """Scores one or several models on the held-out text of the first run, or on text files.

For example:
  python eval.py runs/quickstart --text book.txt
  python eval.py runs/a runs/b --task positions --text novels/ --output runs/evaluation
  python eval.py runs/a --task recall --recall.lengths 1024 4096 --text novels/ --output runs/recall
  python eval.py runs/quickstart --adapt.learning_rate 0.05    # dynamic evaluation

With --output it writes results.json, results.csv and pictures there, and resumes after an interruption."""


def main(arguments: list[str]) -> int:
    config = parse(EvalConfig, arguments, prog=program("eval.py"), description=DESCRIPTION)
    if not config.models:
        raise InputError("name the folder of a run or of a released model, for example: python eval.py runs/quickstart")
    if not config.task:
        raise InputError("name at least one task: --task loss, positions or recall")
    _refuse_unused(config)
    if missing := [path for path in config.models if not Path(path).is_dir()]:
        raise InputError(f"{missing[0]} is no folder: name the folder of a run or of a released model")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    from tttlm.evaluation.evaluate import evaluate
    from tttlm.evaluation.loading import on_mesh
    from tttlm.evaluation.tables import tables

    with on_mesh(config.mesh) as mesh:
        results = evaluate(config, mesh)
    text = json.dumps(results.as_dict(), indent=1, allow_nan=False)
    print(text if config.json else "\n".join(tables(results)))
    if config.output:
        from tttlm.evaluation.pictures import PICTURES, draw

        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "results.json", f"{text}\n".encode())
        write_file(folder / "results.csv", results.as_csv().encode())
        drawn = [path.name for path in draw(results, folder)]
        for name in {*PICTURES} - {*drawn}:  # of an earlier evaluation in this folder
            (folder / name).unlink(missing_ok=True)
        written = ["results.json", "results.csv", *drawn]
        if not config.json:
            print(f"\n{', '.join(written)} are in {folder}")
    return 0


def _refuse_unused(config: EvalConfig) -> None:
    """Refuses options that contradict others, and tasks without anything to do."""
    if config.text:
        refuse_unused(config, "with --text, which is read to its end", "limit")
    if not config.adapt.learning_rate:
        refuse_unused(config, "without --adapt.learning_rate", "adapt")
    needed = {
        "positions": ("positions.protocols", *(f"positions.{name}" for name in config.positions.protocols)),
        "recall": ("recall.tasks", "recall.lengths", "recall.depths"),
    }
    values = {name: value for name, _, value in field_values(config)}
    for task, names in needed.items():
        for name in names:
            if task in config.task and values.get(name) == ():
                raise InputError(f"--task {task} needs at least one of --{name}")


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="finished results are kept in --output: the same command resumes")


if __name__ == "__main__":
    run()
