"""The pictures of an experiment: errors by corruption and severity, shifts against drops, gradients against gains."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tttlm.adaptation.experiment import TITLES, Experiment
from tttlm.adaptation.results import Results
from tttlm.plot_style import tidy

# Colours for colour-blind readers (Okabe and Ito).
COLORS = {
    "none": "#000000",
    "joint": "#7f7f7f",
    "ttt": "#d55e00",
    "ttt_online": "#0072b2",
    "tent": "#009e73",
    "uda_ss": "#cc79a7",
    "batch_statistics": "#e69f00",
}


def draw_errors(experiment: Experiment, results: Results, png: Path) -> None:
    """Draws error by corruption (mean over severities) and by severity (mean over corruptions), with deviations."""
    names = list(dict.fromkeys(c.corruption for c in experiment.conditions))
    figure = Figure(figsize=(max(12, 1.2 * len(names) + 5), 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[max(2.0, len(names) / 4), 1])
    width = 0.8 / len(experiment.methods)
    severities = sorted({c.severity for c in experiment.conditions})
    for i, method in enumerate(experiment.methods):
        style: dict[str, Any] = {"color": COLORS[method], "label": TITLES[method]}
        values = np.array([_mean(experiment, results, method, corruption=name) for name in names])
        left.bar(np.arange(len(names)) + (i + 0.5) * width - 0.4, values.mean(1), width, yerr=_spread(values), **style)
        values = np.array([_mean(experiment, results, method, severity=severity) for severity in severities])
        right.errorbar(severities, values.mean(1), _spread(values), capsize=2, marker="o", markersize=3, **style)
    left.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    left.set_ylabel("error (%)")
    right.set(xlabel="severity (0 is clean)", ylabel="error (%)", xticks=severities)
    left.legend(frameon=False, fontsize=8, ncols=2)
    tidy(left, right)
    figure.savefig(png, dpi=130)


def draw_shifts(results: Results, png: Path) -> None:
    """Draws every measure of shift against the drop in accuracy, those with the highest rank correlation first."""
    names = list(results.shift_ranks)
    columns = 5
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(14, 2.6 * lines), layout="constrained")
    panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for axes, name in zip(panels, names, strict=False):
        axes.plot(results.shifts[name], results.drops, "o", markersize=3, color="#0072b2", alpha=0.7)
        rank = results.shift_ranks[name]
        axes.set_title(f"{name}\nrank correlation {rank.correlation:.2f}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in panels[: len(names) : columns]:
        axes.set_ylabel("accuracy lost (points)", fontsize=8)
    tidy(*panels[: len(names)])
    figure.savefig(png, dpi=130)


def draw_alignment(results: Results, png: Path) -> None:
    """Draws the cosine of the two gradients against the gain of TTT, for every test set and every image."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(results.cosines.ravel(), results.gains.ravel(), "o", markersize=3, alpha=0.7, color="#d55e00")
    by_set, by_image = results.alignment_rank, results.alignment_rank_images
    left.set_title(f"test sets: rank correlation {by_set.correlation:.2f} of {by_set.count}", fontsize=9)
    right.plot(results.image_cosines, results.image_gains, ".", markersize=2, alpha=0.4, color="#d55e00")
    right.set_title(f"images: rank correlation {by_image.correlation:.2f} of {by_image.count}", fontsize=9)
    most = np.nanquantile(np.abs(results.image_gains), 0.995) or 1.0
    right.set_ylim(-most, most)
    for axes in (left, right):
        axes.axhline(0, color="#7f7f7f", linewidth=0.8)
        axes.axvline(0, color="#7f7f7f", linewidth=0.8)
        axes.set(xlabel="cosine of main and self-supervised gradient", ylabel="main loss lowered by TTT (nats)")
    tidy(left, right)
    figure.savefig(png, dpi=130)


def _mean(experiment: Experiment, results: Results, method: str, **of: Any) -> np.ndarray:
    """Error of every seed `[seeds]`, averaged over the conditions of a corruption or a severity."""
    chosen = [i for i, c in enumerate(experiment.conditions) if all(getattr(c, k) == v for k, v in of.items())]
    return results.errors[method][:, chosen].mean(axis=1)


def _spread(values: np.ndarray) -> np.ndarray | None:
    return values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
