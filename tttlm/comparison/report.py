"""The report of a comparison: a folder with `report.md`, `report.json` and plots."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tttlm.comparison.children import read_process
from tttlm.comparison.experiment import Comparison, Entry
from tttlm.comparison.plots import DRAWINGS
from tttlm.comparison.results import Result, Results
from tttlm.comparison.sweep import best
from tttlm.data.store import read_manifest
from tttlm.records import write_file
from tttlm.training.config import TrainConfig, to_dict


def write_report(comparison: Comparison, results: Results, command: str, folder: Path) -> Path:
    """Writes the report and returns the path of `report.md`.

    Args:
        command: the command that reproduces it, which the report quotes.
        folder: the output folder; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw(results, folder / name)
    runs = {entry.name: to_dict(entry.configs[0]) for entry in comparison.entries}
    sweep = {entry.name: [asdict(one) for one in entry.swept] for entry in comparison.entries if entry.swept}
    values = {"command": command, **results.as_dict(), "sweep": sweep, "runs": runs}
    write_file(folder / "report.json", (json.dumps(values, indent=1) + "\n").encode())
    write_file(folder / "report.md", ("\n".join(_lines(comparison, results, command)) + "\n").encode())
    return folder / "report.md"


def _lines(comparison: Comparison, results: Results, command: str) -> Iterator[str]:
    config = comparison.config
    names = [model.name for model in results.models]
    count = len(results.documents)
    documents = f"{count} document{'s' * (count > 1)}"
    yield f"# {', '.join(names)}"
    yield ""
    yield f"`{command}`"
    yield ""
    yield from _text(comparison, results)
    yield training_line(comparison, results.device, results.jax)
    yield from matching_line(comparison)
    yield ""
    yield "## Results"
    yield ""
    yield from results_table(comparison, results)
    yield ""
    yield (
        f"Loss is in nats per token over the first {results.trained_length:,} positions, the training length. "
        f"± is the standard error over {documents}, each counted once, of the mean over seeds; the difference is taken "
        "document by document, so its error is not that of two losses. *seeds*: standard deviation over seeds of the "
        "mean loss. *tokens/s*: training speed, the median over steps. *step*: memory of the compiled training step, "
        "as planned by its compiler (parameters, optimiser state, activations). *process*: peak resident memory of "
        "the training process, as reported by the operating system, including Python, libraries and compilation."
    )
    yield from sweep_lines(comparison)
    yield from models_table(
        (model.name, model.shape, model.parameters, entry.configs[0])
        for entry, model in zip(comparison.entries, results.models, strict=True)
    )
    yield ""
    yield "## Loss against training cost"
    yield ""
    yield "![held-out loss against tokens, FLOPs and seconds](curves.png)"
    yield ""
    yield (
        "On the validation split: documents "
        + ("of another text" if config.held_out else "held out of the training text")
        + (", not those of the table" if config.test else "")
        + ". Lines are means over seeds, bands their range; seconds exclude compilation and evaluation."
    )
    yield ""
    yield "## Loss by position"
    yield ""
    yield "![loss by position](positions.png)"
    yield ""
    pairs = zip(results.bins[:-1], results.bins[1:], strict=True)
    bins = [f"{b:,}" if b == a + 1 else f"{a + 1:,} to {b:,}" for a, b in pairs]
    yield from markdown_table(
        ("tokens read", *names),
        ((bins[i], *(f"{model.by_position[i].mean:.3f}" for model in results.models)) for i in range(len(bins))),
    )
    yield ""
    yield (
        f"Segments of {results.bins[-1]:,} tokens of the same {documents}, each read from the initial state through "
        f"`extend`; positions beyond {results.trained_length:,} are longer than any training sequence."
    )


def training_line(comparison: Comparison, device: str, jax: str) -> str:
    """A sentence on the steps, batches, seeds and device of the runs."""
    run = comparison.entries[0].configs[0]
    seeds = {tuple(config.seed for config in entry.configs) for entry in comparison.entries}
    count = len(comparison.config.seeds)
    of_seeds = f"{count} seed{'s' * (count > 1)}" if len(seeds) == 1 else "the seeds"
    jobs = [facts.jobs for e in comparison.entries for c in e.configs if (facts := read_process(Path(c.run)))]
    together = max(jobs, default=1)
    return (
        f"Each model: {run.steps:,} steps of {run.batch_size} x {run.sequence_length} tokens, the same batches in the "
        f"same order, {run.optimizer.name}, {of_seeds}; device {device}, jax {jax}."
        + f" Up to {together} runs were trained at the same time, so their times are not comparable."
        * (together > 1)
    )


def matching_line(comparison: Comparison) -> Iterator[str]:
    """A sentence on the matching, if models were matched."""
    config, run = comparison.config, comparison.entries[0].configs[0]
    if config.match.by != "none":
        by = "parameters" if config.match.by == "parameters" else f"FLOPs of a token at length {run.sequence_length}"
        yield f"Models are matched to {config.match.to} in {by}, to within {config.match.tolerance:.1%}."


def sweep_lines(comparison: Comparison) -> Iterator[str]:
    """The section on the sweep of learning rates, if there was one."""
    entries = [entry for entry in comparison.entries if entry.swept]
    if not entries:
        return
    steps = comparison.config.sweep.steps or entries[0].configs[0].steps
    rates = comparison.config.sweep.learning_rates
    yield ""
    yield "## Learning rates"
    yield ""
    yield from markdown_table(("model", *(f"{rate:g}" for rate in rates)), map(_sweep_row, entries))
    yield ""
    at_end = [entry.name for entry in entries if best(entry.swept).learning_rate in (min(rates), max(rates))]
    ends = f" The best is at an end of the range for {', '.join(at_end)}." if at_end else ""
    yield (
        f"Held-out loss after {steps:,} steps with the first seed, for each peak learning rate; every model was "
        f"trained with its best, in bold.{ends}"
    )


def _sweep_row(entry: Entry) -> tuple[str, ...]:
    chosen = best(entry.swept)
    return (entry.name, *(f"**{one.loss:.3f}**" if one == chosen else f"{one.loss:.3f}" for one in entry.swept))


def models_table(models: Iterable[tuple[str, dict[str, Any], int, TrainConfig]]) -> Iterator[str]:
    """The section with the shapes of models, from (name, shape, number of parameters, run) of each."""
    head = ("model", "mixers", "num_layers", "hidden_size", "num_heads", "intermediate_size", "parameters")
    yield ""
    yield "## Models"
    yield ""
    yield from markdown_table(
        (*head, "FLOPs/token", "learning rate", "matched by"),
        (
            (
                name,
                ", ".join(shape["mixers"]),
                *(str(shape[key]) for key in ("num_layers", "hidden_size", "num_heads")),
                str(shape["intermediate_size"] or "none"),
                f"{parameters:,}",
                f"{run.model.flops_per_token(run.sequence_length):,.0f}",
                f"{run.optimizer.learning_rate:g}",
                shape["changed"],
            )
            for name, shape, parameters, run in models
        ),
    )
    yield ""
    yield (
        "FLOPs of a forward pass by the model's own formula, mean over a sequence; a training step counts three times."
    )


def results_table(comparison: Comparison, results: Results) -> Iterator[str]:
    """The lines of the table of losses, speed and memory, in Markdown."""
    against = results.models[0].name if comparison.config.against == "first" else "the row above"
    return markdown_table(
        ("model", "held-out loss", "bits per byte", f"minus {against}", "seeds", "tokens/s", "step", "process"),
        (_row(model) for model in results.models),
    )


def _text(comparison: Comparison, results: Results) -> Iterator[str]:
    config = comparison.entries[0].configs[0].data
    manifest = read_manifest(config.path or next(iter(config.mixture)))
    train, held_out = manifest.splits["train"], manifest.splits["validation"]
    if config.validation_path:
        held_out = read_manifest(config.validation_path).splits["validation"]
    yield (
        f"Text: trained on {train.documents:,} documents of {train.tokens:,} tokens "
        f"({train.bytes / 1e6:.1f} MB), curves on {held_out.documents:,} "
        f"{'of another text' if config.validation_path else 'that were held out of it'}; reported on "
        f"{results.tokens_scored:,} tokens of {len(results.documents)} "
        f"{'documents of another text' if comparison.config.test else 'documents held out of it'}. "
        f"Tokenizer of {manifest.tokenizer.vocab_size:,} pieces."
    )
    yield ""


def _row(model: Result) -> tuple[str, ...]:
    spread = _deviation(model.by_seed)
    return (
        model.name,
        model.loss.text(),
        f"{model.bits_per_byte.mean:.4f}",
        "" if model.difference is None else model.difference.text("+"),
        "" if spread is None else f"{spread:.4f}",
        f"{model.tokens_per_second:,.0f}",
        _megabytes(model.step_memory),
        _megabytes(model.peak_memory),
    )


def _deviation(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
