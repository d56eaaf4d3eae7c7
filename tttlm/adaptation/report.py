"""The report of an experiment on images: Markdown, JSON and three pictures."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tttlm.adaptation.experiment import TITLES, Experiment
from tttlm.adaptation.pictures import draw_alignment, draw_errors, draw_shifts
from tttlm.adaptation.results import Rank, Results
from tttlm.errors import InputError
from tttlm.records import write_file, write_json


def write_report(experiment: Experiment, results: Results, command: str, folder: Path) -> Path:
    """Writes `report.md`, `report.json`, `errors.png`, `shift.png` and `alignment.png`; returns the first.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw_errors(experiment, results, folder / "errors.png")
        draw_shifts(results, folder / "shift.png")
        draw_alignment(results, folder / "alignment.png")
        write_json(folder / "report.json", _plain(experiment, results, command))
        write_file(folder / "report.md", ("\n".join(_lines(experiment, results, command)) + "\n").encode())
    except OSError as error:
        raise InputError(f"the report cannot be written to {folder}: {error.strerror or error}") from None
    return folder / "report.md"


def summary(experiment: Experiment, errors: dict[str, Float[np.ndarray, "seeds conditions"]]) -> list[str]:
    """The table of each method's error on clean images and over all shifts, as lines of Markdown."""
    joint = errors["joint"]
    corruptions = list(dict.fromkeys(c.corruption for c in experiment.conditions))[1:]
    lines = [
        "| method | clean | all shifts | against joint training | corruptions better / worse than joint training |",
        "|---|---|---|---|---|",
    ]
    for method in experiment.methods:
        error = errors[method]
        by_corruption = [
            (error - joint)[:, [i for i, c in enumerate(experiment.conditions) if c.corruption == name]].mean()
            for name in corruptions
        ]
        better, worse = sum(gap < 0 for gap in by_corruption), sum(gap > 0 for gap in by_corruption)
        shifts = error[:, 1:].mean(axis=1)
        apart = "" if method == "joint" else _with_spread(shifts - joint[:, 1:].mean(axis=1), sign=True)
        counts = "" if method == "joint" else f"{better} / {worse} of {len(corruptions)}"
        lines.append(
            f"| {TITLES[method]} | {_with_spread(error[:, 0])} | {_with_spread(shifts)} | {apart} | {counts} |"
        )
    return lines


def _lines(experiment: Experiment, results: Results, command: str) -> list[str]:
    config = experiment.config
    methods = [TITLES[method] for method in experiment.methods]
    best, single = results.alignment_rank, results.alignment_rank_images
    return [
        "# Test-time training under corruptions",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        f"{len(experiment.train):,} images of {config.source} to train on, the same {len(experiment.test):,} others "
        f"under every shift; seeds {', '.join(map(str, config.seeds))} of parameters, order and augmentation. Errors "
        "in percent, mean ± standard deviation over seeds, which does not include that the test images are a sample, "
        "the same for all.",
        "",
        *summary(experiment, results.errors),
        "",
        "*No adaptation* and *TENT* start from a model trained on the main loss alone, the others from one that was "
        "trained on both losses. *UDA-SS* uses all test images before it predicts. Each is reset at every test set.",
        "",
        "![errors](errors.png)",
        "",
        "## Which measure of shift predicts the drop in accuracy?",
        "",
        f"Between {len(experiment.reference):,} unshifted images that were not trained on and each shifted test set, "
        "on the inputs of the last layer of the model without adaptation, or its logits: Spearman's rank "
        f"correlation with its drop in accuracy, over {len(results.drops)} shifts. All shifts are of the same images, "
        "so p-values are too small.",
        "",
        "| measure | rank correlation | p-value | shifts measured |",
        "|---|---|---|---|",
        *(_rank_row(name, rank) for name, rank in results.shift_ranks.items()),
        "",
        "![shift](shift.png)",
        "",
        "## Does agreement of the gradients predict the gain?",
        "",
        "The cosine of the gradients of main and self-supervised loss in the shared parameters, before TTT, and how "
        f"much TTT lowers the main loss: rank correlation {_number(best.correlation)} over {best.count} test sets "
        f"(mean cosine, mean gain), {_number(single.correlation)} over {single.count:,} images.",
        "",
        "![alignment](alignment.png)",
        "",
        "## Every corruption and severity",
        "",
        "| test set | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
        *(
            f"| {name} | "
            + " | ".join(_with_spread(results.errors[method][:, i]) for method in experiment.methods)
            + " |"
            for i, name in enumerate(results.conditions)
        ),
    ]


def _rank_row(name: str, rank: Rank) -> str:
    # A vertical bar in a name would end its cell.
    cells = name.replace("|", "/"), _number(rank.correlation), _number(rank.p_value, "g"), str(rank.count)
    return f"| {' | '.join(cells)} |"


def _with_spread(values: np.ndarray, sign: bool = False) -> str:
    mean = f"{values.mean():+.1f}" if sign else f"{values.mean():.1f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.1f}"


def _number(value: float, kind: str = "f") -> str:
    return "-" if np.isnan(value) else f"{value:.2{kind}}"


def _plain(experiment: Experiment, results: Results, command: str) -> dict[str, object]:
    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return plain(value.tolist())
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if isinstance(value, float):
            return round(value, 6) if np.isfinite(value) else None
        return value

    left_out = {"image_cosines", "image_gains"}  # thousands of numbers; they are in the picture
    numbers = {key: value for key, value in asdict(results).items() if key not in left_out}
    return {"command": command, "config": plain(asdict(experiment.config)), **{k: plain(v) for k, v in numbers.items()}}
