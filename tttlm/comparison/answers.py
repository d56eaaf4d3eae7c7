"""Comparison of models that were trained on generated sequences: the accuracy of their answers."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tttlm.comparison.experiment import Comparison, Entry
from tttlm.comparison.report import (
    markdown_table,
    matching_line,
    models_table,
    sweep_lines,
    training_line,
)
from tttlm.comparison.scores import device_name
from tttlm.errors import InputError
from tttlm.evaluation.config import EvalConfig, RecallConfig
from tttlm.evaluation.evaluate import evaluate
from tttlm.evaluation.results import RecallRecord
from tttlm.model import parameter_count
from tttlm.plot_style import COLORS, MARKERS, tidy
from tttlm.records import read_record, write_file, write_json, write_sealed
from tttlm.training.checkpoint_files import checkpoint_digest
from tttlm.training.config import to_dict
from tttlm.training.run_folder import RunFolder

SIZES = {"mqar": "pairs", "copy": "tokens"}


@dataclass(frozen=True)
class AnswersJob:
    """Finished runs to score, the digests of their checkpoints, and the sequences."""

    runs: list[str]
    checkpoints: list[str]
    tasks: list[str]
    lengths: list[int]
    samples: int


@dataclass(frozen=True)
class Answers:
    """The scores of a job.

    Attributes:
        job: the job.
        cells: the recall of every run, task and length, as in `results.json` of an evaluation.
        device, jax: the device and the version of JAX that computed them.
    """

    job: AnswersJob
    cells: list[RecallRecord]
    device: str
    jax: str


def answers_job(comparison: Comparison) -> tuple[AnswersJob, Path, Path]:
    """The job of a comparison whose runs are finished, and the files of the job and of its results."""
    run = comparison.entries[0].configs[0]
    generated, settings = run.data.generated, comparison.config.answers
    runs = [config for entry in comparison.entries for config in entry.configs]
    job = AnswersJob(
        [config.run for config in runs],
        [checkpoint_digest(RunFolder(config.run).checkpoints, config.steps) for config in runs],
        list(generated.tasks),
        list(settings.lengths or generated.lengths),
        settings.samples,
    )
    folder = Path(comparison.config.output) / "answers"
    return job, folder / "job.json", folder / "answers.json"


def unscored(comparison: Comparison) -> Path | None:
    """Writes the job into a file for `do_answers_job`; None if its results exist."""
    job, file, results = answers_job(comparison)
    if read_answers(results, job) is not None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, job)
    return file


def read_answers(file: Path, job: AnswersJob) -> Answers | None:
    """The results in a file; None if they are missing, altered or of another job."""
    try:
        found = read_record(file, Answers, advice="", sealed=True)
    except InputError:
        return None
    return found if found.job == job else None


def do_answers_job(file: Path) -> None:
    """Scores the runs of a job; each score is stored at once, so that a stopped job can be resumed."""
    job = read_record(file, AnswersJob, advice="start the comparison again")
    recall: Any = {"tasks": tuple(job.tasks), "lengths": tuple(job.lengths), "samples": job.samples}
    config = EvalConfig(
        models=tuple(job.runs),
        task=("recall",),
        output=str(file.parent),
        recall=RecallConfig(**recall),
        # One shape for all lengths, which is compiled once for each model.
        batch_size=job.samples,
        chunk=16,
        max_length=-(-max(job.lengths) // 16) * 16,
    )
    cells = evaluate(config).recall
    write_sealed(file.with_name("answers.json"), Answers(job, cells, device_name(), jax.__version__))


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a model.

    Attributes:
        name: the name of the model.
        state_bytes: bytes of the state of one layer, with a cache for the longest sequence.
        by_task: for every task, percent of the answers' tokens that are the most likely ones, `[seeds, lengths]`.
    """

    name: str
    state_bytes: int
    by_task: dict[str, list[list[float]]]


def accuracies(comparison: Comparison, answers: Answers) -> list[Accuracy]:
    """The accuracy of every model, in the order of the comparison."""
    lengths = answers.job.lengths
    # Evaluations name a run by the end of its path; the cells are in the order of runs, tasks and lengths.
    found = np.asarray([cell.token_accuracy for cell in answers.cells])
    found = found.reshape(-1, len(answers.job.tasks), len(lengths))
    result, start = [], 0
    for entry in comparison.entries:
        of_seeds = found[start : start + len(entry.configs)]
        start += len(entry.configs)
        by_task = {task: of_seeds[:, i].tolist() for i, task in enumerate(answers.job.tasks)}
        result.append(Accuracy(entry.name, _state_bytes(entry, max(lengths)), by_task))
    return result


def _state_bytes(entry: Entry, length: int) -> int:
    model = entry.configs[0].model
    return model.with_cache_length(length).state_bytes // model.num_layers


def write_answers_report(comparison: Comparison, command: str, folder: Path) -> Path:
    """Writes `report.md`, `report.json` and `recall.png`, and returns the path of the first."""
    job, _, file = answers_job(comparison)
    answers = read_answers(file, job)
    assert answers is not None, f"{file} has no scores"
    folder.mkdir(parents=True, exist_ok=True)
    models = accuracies(comparison, answers)
    of_a_run = answers.cells[: len(job.tasks) * len(job.lengths)]
    sizes = {task: [cell.pairs or 0 for cell in of_a_run if cell.task == task] for task in job.tasks}
    draw_recall(models, sizes, folder / "recall.png")
    values = {
        "command": command,
        "device": answers.device,
        "jax": answers.jax,
        "sizes": sizes,
        "models": [asdict(model) for model in models],
        "sweep": {entry.name: [asdict(one) for one in entry.swept] for entry in comparison.entries},
        "runs": {entry.name: to_dict(entry.configs[0]) for entry in comparison.entries},
    }
    write_file(folder / "report.json", (json.dumps(values, indent=1) + "\n").encode())
    lines = _lines(comparison, answers, models, sizes, command)
    write_file(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return folder / "report.md"


def recall_table(models: list[Accuracy], sizes: dict[str, list[int]], task: str) -> Iterator[str]:
    """The lines of the table of a task in Markdown: means over seeds, and their range where it is not one number."""
    head = ("model", "bytes of a layer's state", *(f"{size} {SIZES[task]}" for size in sizes[task]))
    return markdown_table(
        head,
        (
            (model.name, f"{model.state_bytes:,}", *map(_cell, zip(*model.by_task[task], strict=True)))
            for model in models
        ),
    )


def _cell(of_seeds: tuple[float, ...]) -> str:
    low, high = min(of_seeds), max(of_seeds)
    mean = f"{sum(of_seeds) / len(of_seeds):.1f}"
    return mean if high - low < 0.1 else f"{mean} ({low:.0f}–{high:.0f})"


def _lines(
    comparison: Comparison, answers: Answers, models: list[Accuracy], sizes: dict[str, list[int]], command: str
) -> Iterator[str]:
    run = comparison.entries[0].configs[0]
    generated = run.data.generated
    yield f"# Recall: {', '.join(model.name for model in models)}"
    yield ""
    yield f"`{command}`"
    yield ""
    yield (
        f"Trained from scratch on generated sequences of {' and '.join(generated.tasks)} (docs/evaluation.md) of "
        f"{', '.join(map(str, generated.lengths))} tokens, mixed evenly; the loss is that of answers alone."
    )
    yield training_line(comparison, answers.device, answers.jax)
    yield from matching_line(comparison)
    for task in generated.tasks:
        yield ""
        yield f"## {task}"
        yield ""
        yield from recall_table(models, sizes, task)
    yield ""
    yield (
        f"Percent of the answers' tokens that are the most likely ones, in {answers.job.samples} new sequences of each "
        "size: the mean over seeds, and in brackets the lowest and highest seed. *State*: what a layer keeps of one "
        f"sequence; a cache of attention is as long as the longest sequence ({max(answers.job.lengths)} tokens)."
    )
    yield ""
    yield "![accuracy against the number of pairs or tokens](recall.png)"
    yield ""
    yield "Lines are means over seeds, bands their range."
    yield from sweep_lines(comparison)
    yield from models_table(
        (entry.name, entry.shape, parameter_count(entry.configs[0].model), entry.configs[0])
        for entry in comparison.entries
    )


def draw_recall(models: list[Accuracy], sizes: dict[str, list[int]], png: Path) -> Path:
    """Draws accuracy against the number of pairs or tokens, a panel for each task."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(5.2 * len(sizes) + 2.8, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, (task, counts) in zip(panels, sizes.items(), strict=True):
        for i, model in enumerate(models):
            found, color = np.asarray(model.by_task[task]), COLORS[i % len(COLORS)]
            label = f"{model.name} ({model.state_bytes / 1000:,.1f} kB)"
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(counts, found.mean(axis=0), color=color, marker=marker, markersize=4, label=label)
            axes.fill_between(counts, found.min(axis=0), found.max(axis=0), color=color, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=f"{SIZES[task]} in the context", title=task, ylim=(-2, 103))
        tidy(axes)
    panels[0].set_ylabel("correct tokens of answers (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="model (state of a layer)",
        frameon=False,
        loc="outside right upper",
    )
    figure.savefig(png, dpi=130)
    return png
