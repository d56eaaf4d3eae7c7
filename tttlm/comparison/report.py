"""The report of a comparison: a folder with `report.md`, `report.json` and plots."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tttlm.comparison.experiment import Comparison
from tttlm.comparison.plots import DRAWINGS
from tttlm.comparison.results import Result, Results
from tttlm.data.store import read_manifest
from tttlm.records import write_file
from tttlm.training.config import to_dict


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
    values = {"command": command, **results.as_dict(), "runs": runs}
    write_file(folder / "report.json", (json.dumps(values, indent=1) + "\n").encode())
    write_file(folder / "report.md", ("\n".join(_lines(comparison, results, command)) + "\n").encode())
    return folder / "report.md"


def _lines(comparison: Comparison, results: Results, command: str) -> Iterator[str]:
    config, run = comparison.config, comparison.entries[0].configs[0]
    seeds = {tuple(model.seeds) for model in results.models}
    of_seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}" if len(seeds) == 1 else "the seeds"
    names = [model.name for model in results.models]
    count = len(results.documents)
    documents = f"{count} document{'s' * (count > 1)}"
    yield f"# {', '.join(names)}"
    yield ""
    yield f"`{command}`"
    yield ""
    yield from _text(comparison, results)
    yield (
        f"Each model: {run.steps:,} steps of {run.batch_size} x {run.sequence_length} tokens, the same batches in the "
        f"same order, AdamW, {of_seeds}; device {results.device}, jax {results.jax}."
    )
    if config.match.by != "none":
        by = "parameters" if config.match.by == "parameters" else f"FLOPs of a token at length {run.sequence_length}"
        yield f"Models are matched to {config.match.to} in {by}, to within {config.match.tolerance:.1%}."
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
    yield ""
    yield "## Models"
    yield ""
    yield from _table(
        (
            "model",
            "mixers",
            "num_layers",
            "hidden_size",
            "num_heads",
            "intermediate_size",
            "parameters",
            "FLOPs/token",
            "matched by",
        ),
        (_shape(model) for model in results.models),
    )
    yield ""
    yield (
        "FLOPs of a forward pass by the model's own formula, mean over a sequence; a training step counts three times."
    )
    yield ""
    yield "## Loss against training cost"
    yield ""
    yield "![held-out loss against tokens, FLOPs and seconds](curves.png)"
    yield ""
    yield (
        "On the validation split: documents held out of the training text"
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
    yield from _table(
        ("tokens read", *names),
        ((bins[i], *(f"{model.by_position[i].mean:.3f}" for model in results.models)) for i in range(len(bins))),
    )
    yield ""
    yield (
        f"Segments of {results.bins[-1]:,} tokens of the same {documents}, each read from the initial state through "
        f"`extend`; positions beyond {results.trained_length:,} are longer than any training sequence."
    )


def results_table(comparison: Comparison, results: Results) -> Iterator[str]:
    """The lines of the table of losses, speed and memory, in Markdown."""
    against = results.models[0].name if comparison.config.against == "first" else "the row above"
    return _table(
        ("model", "held-out loss", "bits per byte", f"minus {against}", "seeds", "tokens/s", "step", "process"),
        (_row(model) for model in results.models),
    )


def _text(comparison: Comparison, results: Results) -> Iterator[str]:
    config = comparison.entries[0].configs[0].data
    manifest = read_manifest(config.path or next(iter(config.mixture)))
    train, held_out = (manifest.splits[split] for split in ("train", "validation"))
    yield (
        f"Text: trained on {train.documents:,} documents of {train.tokens:,} tokens "
        f"({train.bytes / 1e6:.1f} MB), curves on {held_out.documents:,} that were held out of it; reported on "
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


def _shape(model: Result) -> tuple[str, ...]:
    shape = model.shape
    return (
        model.name,
        ", ".join(shape["mixers"]),
        *(str(shape[name]) for name in ("num_layers", "hidden_size", "num_heads")),
        str(shape["intermediate_size"] or "none"),
        f"{model.parameters:,}",
        f"{model.flops_per_token:,.0f}",
        shape["changed"],
    )


def _deviation(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
