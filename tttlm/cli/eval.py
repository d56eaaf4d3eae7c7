"""`eval.py`: loss, perplexity and bits per byte of a run, on its held-out text or on text files."""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from tttlm.adaptation.language_model import DynamicConfig
from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import InputError
from tttlm.ranges import CountOrZero, FilePath

DESCRIPTION = """Scores a run on its held-out text, or on text files.

For example:  python eval.py runs/quickstart --text book.txt
Learning as it reads:  python eval.py runs/quickstart --adapt.learning_rate 0.05"""


@dataclass(frozen=True)
class EvalConfig:
    """What is scored."""

    run: tyro.conf.Positional[FilePath] = ""
    """The folder of a run."""
    text: tuple[FilePath, ...] = ()
    """Text files to score, each as one document; none scores the run's held-out documents."""
    step: CountOrZero | None = None
    """The checkpoint to read; None is the newest."""
    limit: CountOrZero = 0
    """Bytes of held-out text to score, in whole documents; 0 scores all of it."""
    chunk: CountOrZero = 0
    """Tokens of a row that are read at a time; 0 is what suits the text."""
    task: Literal["loss"] = "loss"
    """What is measured."""
    adapt: DynamicConfig = field(default_factory=DynamicConfig)
    """Dynamic evaluation, with a learning rate above 0: scores once more while the model learns from each stretch of
    text after it was scored on it."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> int:
    config = parse(EvalConfig, arguments, prog=program("eval.py"), description=DESCRIPTION)
    if not config.run:
        raise InputError("name the folder of a run, for example: python eval.py runs/quickstart")
    if missing := [name for name in config.text if not Path(name).is_file()]:
        raise InputError(f"text file {missing[0]} does not exist")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    from tttlm.evaluation.run import load_run

    run = load_run(config.run, config.step)
    if config.text:
        scores = {name: run.score_file(Path(name), chunk=config.chunk or 2048) for name in config.text}
    else:
        scores = {"held-out text": run.score_held_out(limit=config.limit, chunk=config.chunk or 256)}
    if config.adapt.learning_rate:
        from tttlm.evaluation.dynamic import held_out, score_learning, text_file

        for name in list(scores):
            documents = text_file(run, Path(name)) if config.text else held_out(run, config.limit)
            scores[f"{name}, learning as it reads"] = score_learning(run, documents, config.adapt)
    rows: list[dict[str, Any]] = [
        {
            "text": name,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
        }
        for name, score in scores.items()
    ]
    if config.json:
        print(json.dumps({"run": config.run, "step": run.step, "scores": rows}, indent=2))
        return 0
    print(f"{config.run}, step {run.step}")
    width = max(len(row["text"]) for row in rows)
    print(f"{'text':{width}}  {'bytes':>12}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}  {'bits per byte':>13}")
    for row in rows:
        print(
            f"{row['text']:{width}}  {row['bytes']:12,}  {row['tokens']:12,}  {row['loss']:8.4f}"
            f"  {row['perplexity']:10.2f}  {row['bits_per_byte']:13.4f}"
        )
    return 0


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="nothing was changed")
