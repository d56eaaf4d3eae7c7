"""Plots of any metrics of several runs, over steps, tokens, FLOPs or seconds."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttlm.data.finding import printable
from tttlm.errors import InputError
from tttlm.plot_style import tidy
from tttlm.ranges import LARGEST_FLOAT32
from tttlm.training.metrics import Record, by_step, read_metrics
from tttlm.training.run_folder import RunFolder

AGAINST = {"step": "step", "tokens": "tokens_seen", "flops": "flops", "seconds": "seconds"}
LABELS = {"step": "step", "tokens": "tokens seen", "flops": "training FLOPs", "seconds": "seconds of training"}
STYLES = ("-", "--", ":", "-.")
MOST_NAMED = 12  # lines of a picture that a legend can name


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run, and its name in pictures."""

    label: str
    records: list[Record]

    @property
    def names(self) -> list[str]:
        """The names of all metrics that can be plotted."""
        found = {name for record in self.records for name, value in record.items() if isinstance(value, (int, float))}
        return sorted(found - {"step", "good", "batch"})

    def series(self, name: str, against: str) -> Float[np.ndarray, "N 2"]:
        """The values of `against` and of `name` at the steps that have `name`, without those not finite in float32.

        Lines of evaluations have only a step; on another axis they have the value of the training step.
        """
        points = by_step(self.records, name)
        points = points[np.abs(points[:, 1]) < LARGEST_FLOAT32]
        if against != "step":
            column = AGAINST[against]
            known = by_step(self.records, column)
            if not len(known):
                raise InputError(f"{self.label} did not record '{column}': plot against step")
            points[:, 0] = np.interp(points[:, 0], *known.T)
        return points


def read_runs(folders: Sequence[str]) -> list[RunMetrics]:
    """The metrics of runs, labelled by the distinguishing part of their paths.

    Raises:
        InputError: a folder has no metrics.
    """
    runs = []
    for folder in folders:
        path = RunFolder(folder).metrics
        if not path.is_file():
            raise InputError(f"{folder} is not a run directory: it has no {path.name}")
        runs.append(RunMetrics(printable(_label(folder, folders)), read_metrics(path)))
    return runs


def _label(folder: str, folders: Sequence[str]) -> str:
    parts = Path(folder).parts
    same = [Path(other).parts for other in folders if other != folder]
    return next(
        ("/".join(parts[-n:]) for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in same)),
        str(folder),
    )


def pick_names(runs: Sequence[RunMetrics], pattern: str) -> list[str]:
    """The names of metrics that match a pattern such as `layer_*/drift_100`.

    Raises:
        InputError: there are none; lists those that exist.
    """
    names = sorted({name for run in runs for name in run.names})
    found = fnmatch.filter(names, pattern)
    if not found:
        raise InputError(f"no run has '{pattern}'; there are {', '.join(summary(names)) or 'no metrics yet'}")
    return sorted(found, key=_natural)


def _natural(name: str) -> list[Any]:
    """Sorts drift_25 before drift_100."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def summary(names: Sequence[str]) -> list[str]:
    """Names with those of layers put together as `layer_*/...`."""
    return sorted(
        {f"layer_*/{name.partition('/')[2]}" if name.startswith("layer_") else name for name in names}, key=_natural
    )


def draw_curves(
    runs: Sequence[RunMetrics], patterns: Sequence[str], png: Path, *, against: str = "step", log: bool = False
) -> Path:
    """Draws one panel for every pattern, with one line for every run and name; returns the path of the picture.

    Args:
        runs: see `read_runs`.
        patterns: see `pick_names`.
        png: the file to write.
        against: the horizontal axis, one of `AGAINST`.
        log: whether the vertical axis is logarithmic.

    Raises:
        InputError: a pattern matches nothing, or a run does not have the axis.
    """
    panels = [pick_names(runs, pattern) for pattern in patterns]
    figure = Figure(figsize=(8.5, 3.4 * len(panels) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, names, pattern in zip(all_axes, panels, patterns, strict=True):
        _draw_panel(axes, runs, names, against)
        axes.set(ylabel=names[0] if len(names) == 1 else pattern, yscale="log" if log else "linear")
    all_axes[-1].set_xlabel(LABELS[against])
    figure.savefig(png, dpi=150)
    return png


def _draw_panel(axes: Axes, runs: Sequence[RunMetrics], names: Sequence[str], against: str) -> None:
    """Draws one panel. Runs are distinguished by colour, or by line style if the colours are needed for the names."""
    several = len(names) > 1
    count = len(names) if several else len(runs)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.92, count)) if several else mpl.colormaps["tab10"](range(10))
    lines = []
    for i, run in enumerate(runs):
        for j, name in enumerate(names):
            points = run.series(name, against) if name in run.names else np.empty((0, 2))
            if not len(points):
                continue
            colour = colours[j if several else i % len(colours)]
            style = STYLES[i % len(STYLES)] if several else "-"
            label = " ".join([*([run.label] if len(runs) > 1 or not several else []), *([name] if several else [])])
            lines.append((_draw_line(axes, points, colour, style, crowded=several), label))
    tidy(axes)
    if not lines:
        raise InputError(f"no run has a finite value of {', '.join(names)}: plot another metric")
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), MOST_NAMED)).round().astype(int))
    handles, labels = zip(*[lines[i] for i in chosen], strict=True)
    axes.legend(handles, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_line(axes: Axes, points: Float[np.ndarray, "N 2"], colour: Any, style: str, *, crowded: bool) -> Any:
    """Draws a series; a long one as its running mean, with its values behind it."""
    window = max(len(points) // 50, 1)
    if window > 1:
        if not crowded:
            axes.plot(*points.T, color=colour, alpha=0.25, linewidth=0.7)
        mean = np.convolve(points[:, 1], np.ones(window) / window, mode="valid")
        points = np.stack([points[window - 1 :, 0], mean], axis=1)
    marker = "o" if len(points) < 30 else None
    return axes.plot(*points.T, color=colour, linestyle=style, linewidth=1.5, marker=marker, markersize=3)[0]
