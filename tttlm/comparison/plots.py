"""Plots of a comparison: loss against training cost, and against the position in a document."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from tttlm.comparison.results import Result, Results
from tttlm.plot_style import COLORS, MARKERS, tidy

COSTS = (
    ("tokens", "training tokens"),
    ("flops", "training FLOPs, by each model's formula"),
    ("seconds", "seconds of training"),
)


def draw_curves(results: Results, png: Path) -> Path:
    """Draws held-out loss against tokens, FLOPs and seconds; the line is the mean over seeds, the band their range."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels: Any = figure.subplots(1, 3, sharey=True)
    for axes, (cost, label) in zip(panels, COSTS, strict=True):
        for model, style in _styled(results):
            cost_at = np.mean([getattr(curve, cost) for curve in model.held_out], axis=0)
            losses = np.asarray([curve.loss for curve in model.held_out])
            axes.plot(cost_at, losses.mean(axis=0), label=model.name, **style)
            if len(losses) > 1:
                axes.fill_between(cost_at, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        tidy(axes)
    panels[0].set_ylabel("held-out loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(png, dpi=130)
    return png


def draw_positions(results: Results, png: Path) -> Path:
    """Draws loss by position with its standard error over documents, and the difference from the first model."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.asarray(results.bins)
    # The middle of a bin on the logarithmic axis; position 0 has one token of context.
    middles = np.sqrt((bins[:-1] + 1.0) * bins[1:])
    first = np.asarray([point.mean for point in results.models[0].by_position])
    for model, style in _styled(results):
        means = np.asarray([point.mean for point in model.by_position])
        errors = np.asarray([point.error or 0.0 for point in model.by_position])
        left.errorbar(middles, means, errors, label=model.name, capsize=2, **style)
        right.plot(middles, means - first, **style)
    left.set_ylabel("held-out loss (nats per token)")
    right.set_ylabel(f"loss minus that of {results.models[0].name}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens read")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        if results.trained_length < bins[-1]:
            axes.axvline(results.trained_length, color="#999999", linestyle=":", linewidth=1)
            note: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 8, "color": "#777777"}
            axes.text(results.trained_length, axes.get_ylim()[0], " training length", **note)
        tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(png, dpi=130)
    return png


def _styled(results: Results) -> Iterator[tuple[Result, dict[str, Any]]]:
    for i, model in enumerate(results.models):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        yield model, {**look, "markersize": 4, "linewidth": 1.4}


DRAWINGS: dict[str, Callable[[Results, Path], Path]] = {"curves.png": draw_curves, "positions.png": draw_positions}
