"""The pictures of an evaluation: loss against position, what context is worth, and recall by depth and length."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tttlm.evaluation.config import RecallTask
from tttlm.evaluation.results import CurveRecord, RecallRecord, Results
from tttlm.plot_style import COLORS, MARKERS, tidy

PICTURES = ("positions.png", "gain.png", *(f"recall_{task}.png" for task in get_args(RecallTask)))
FEW = 32  # positions below which a loss is that of few tokens, and high


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Writes the pictures that there are numbers for, and gives where each is."""
    for kind, name, label in (
        ("loss", "positions.png", "loss (nats per token)"),
        ("gain", "gain.png", "loss after a reset minus loss (nats per token)"),
    ):
        curves = [curve for curve in results.positions if curve.kind == kind]
        if curves:
            yield _draw_curves(curves, [model.name for model in results.models], label, folder / name)
    for task in dict.fromkeys(cell.task for cell in results.recall):
        yield _draw_recall([cell for cell in results.recall if cell.task == task], folder / f"recall_{task}.png")


def _draw_curves(curves: Sequence[CurveRecord], models: Sequence[str], label: str, png: Path) -> Path:
    """A panel for each protocol, a line for each model, with its interval as a band."""
    panels = list(dict.fromkeys((curve.protocol, curve.against) for curve in curves))
    figure = Figure(figsize=(max(6.4, 4.6 * len(panels)), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (protocol, against) in zip(all_axes, panels, strict=True):
        for curve in curves:
            if (curve.protocol, curve.against) == (protocol, against):
                _draw_line(axes, curve, models.index(curve.model))
        axes.set(xscale="log", xlabel="tokens read before", title=f"{protocol}, {against}" if against else protocol)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        tidy(axes)
    later = [v for c in curves for start, v in zip(c.bins, c.mean, strict=False) if start >= FEW and v is not None]
    if later and min(later) < max(later):  # what is compared fills the picture; the first tokens may leave it
        margin = 0.15 * (max(later) - min(later))
        all_axes[0].set_ylim(min(later) - margin, max(later) + margin)
    all_axes[0].set_ylabel(label)
    figure.legend(*all_axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(png, dpi=150)
    return png


def _draw_line(axes: Axes, curve: CurveRecord, place: int) -> None:
    number = lambda values: np.asarray([np.nan if v is None else v for v in values], float)
    middle = np.sqrt((np.asarray(curve.bins[:-1]) + 1.0) * np.asarray(curve.bins[1:]))
    color = COLORS[place % len(COLORS)]
    axes.plot(
        middle, number(curve.mean), color=color, marker=MARKERS[place % len(MARKERS)], markersize=3, label=curve.model
    )
    if curve.low is not None and curve.high is not None:
        axes.fill_between(middle, number(curve.low), number(curve.high), color=color, alpha=0.15, linewidth=0)


def _draw_recall(cells: Sequence[RecallRecord], png: Path) -> Path:
    """A heat map for each model: depth against length; a row of one depth for tasks without it."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({-1.0 if cell.depth is None else cell.depth for cell in cells})
    height = 1.6 + 0.45 * len(depths)
    figure = Figure(figsize=(1.6 + (1.4 + 0.8 * len(lengths)) * len(models), height), layout="constrained")
    all_axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(all_axes, models, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell.model == model:
                at = depths.index(-1.0 if cell.depth is None else cell.depth), lengths.index(cell.length)
                grid[at] = cell.exact_match
                axes.text(
                    at[1], at[0], f"{cell.exact_match:.0f}", ha="center", va="center", color="#888888", fontsize=8
                )
        shown = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), ["" if depth < 0 else f"{depth:g}" for depth in depths])
        axes.set(title=model, xlabel="tokens", ylabel="depth" if depths[0] >= 0 else "")
    figure.colorbar(shown, ax=list(all_axes), label="answers right (%)")
    figure.savefig(png, dpi=150)
    return png
