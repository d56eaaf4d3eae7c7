"""Compares test-time training with other methods on shifted data: trains, corrupts, adapts, measures, writes a report.

python -m tttlm.cli.adapt configs/adapt/digits.yaml [--output FOLDER] [--NAME VALUE ...]

A file with `kind: text` compares language models instead: each is scored on the held-out text of the others, with and
without dynamic evaluation. After an interruption the same command resumes.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tttlm.cli.arguments import find_config, parse, run_command
from tttlm.data.finding import printable
from tttlm.errors import InputError
from tttlm.yaml_file import read_yaml

if TYPE_CHECKING:
    from tttlm.adaptation.text import Reader

PROGRAM = "python -m tttlm.cli.adapt"


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment of a configuration file; flags override the file."""
    words = list(arguments)
    file = words.pop(0) if words and not words[0].startswith("-") else None
    if file is None and not {"-h", "--help"} & set(words):
        raise InputError(f"name a configuration, for example: {PROGRAM} configs/adapt/digits.yaml")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    values = read_yaml(find_config(file)) if file else {}
    of_text = isinstance(values, dict) and values.get("kind") == "text"
    flags = [*(["--config", str(find_config(file))] if file else []), *words]
    command = printable(" ".join([PROGRAM, *arguments]))
    return _text(flags, command) if of_text else _images(flags, command)


def _images(flags: list[str], command: str) -> int:
    from tttlm.adaptation.experiment import Experiment, ImagesConfig
    from tttlm.adaptation.report import summary, write_report
    from tttlm.adaptation.results import all_errors, collect

    config = parse(ImagesConfig, flags, prog=PROGRAM, description=__doc__ or "")
    experiment = Experiment(config)
    experiment.run()
    if config.tune:
        print("\n".join(summary(experiment, all_errors(experiment))))
        return 0
    results = collect(experiment)
    folder = Path(config.report) if config.report else Path(config.output) / "report"
    report = write_report(experiment, results, command, folder)
    print("\n".join(summary(experiment, results.errors)), report, sep="\n\n")
    return 0


def _text(flags: list[str], command: str) -> int:
    from tttlm.adaptation.text import TextConfig, measure_shifts, read_all, reading_table, write_text_report

    config = parse(TextConfig, flags, prog=PROGRAM, description=__doc__ or "")
    if len(config.runs) < 2:
        raise InputError("name at least two runs: --runs FOLDER FOLDER")
    names = [Path(folder).absolute().name for folder in config.runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two of --runs have the name {twice[0]!r}, by which the report would list both: rename one")
    readers = [_reader(folder, config.text_bytes, config.adapt.stretch) for folder in config.runs]
    kept = Path(config.output) / "readings"
    kept.mkdir(parents=True, exist_ok=True)
    readings = read_all(readers, config.adapt, kept)
    shifts = measure_shifts(readers, config.adapt.stretch)
    report = write_text_report(readings, shifts, config, command, Path(config.output))
    print("\n".join(reading_table(readings)), report, sep="\n\n")
    return 0


def _reader(folder: str, text_bytes: int, stretch: int) -> "Reader":
    """The model of a run, with a cache of as many tokens as there are bytes, and its held-out text."""
    from tttlm.adaptation.text import Reader
    from tttlm.evaluation.run import load_run

    run = load_run(folder, max_length=text_bytes + stretch)
    tokenizer = run.tokenizer()
    entry = [] if tokenizer.entry_id is None else [tokenizer.entry_id]

    def texts() -> Iterator[str]:
        left = text_bytes
        for document in run.held_out(text_bytes):
            entered = (
                document.tokens[len(entry) :] if document.tokens[: len(entry)].tolist() == entry else document.tokens
            )
            text = tokenizer.decode(entered.tolist()).encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
            if text:
                yield text

    encode = lambda text: np.array([*entry, *tokenizer.encode(text)], np.int32)
    return Reader(Path(folder).absolute().name, run.model, encode, list(texts()))


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="finished parts are kept: the same command resumes")


if __name__ == "__main__":
    run()
