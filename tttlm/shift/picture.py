"""The picture of a comparison: both samples in two dimensions, and the largest differences."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttlm.errors import InputError
from tttlm.plot_style import tidy

COLOURS = "#2a5d9f", "#c4472f"
_POINTS = 2000


@dataclass(frozen=True)
class Difference:
    """A difference between the samples, in one feature or token.

    Attributes:
        name: the name of the feature or token.
        size: the size of the difference, in the unit of the ranking.
        more_in_b: whether it is larger in B.
    """

    name: str
    size: float
    more_in_b: bool


def draw(
    a: np.ndarray,
    b: np.ndarray,
    differences: list[Difference],
    png: Path,
    *,
    names: tuple[str, str],
    title: str,
    unit: str,
    pixels: np.ndarray | None = None,
) -> Path:
    """Draws both samples along the first two principal components of their union, and a ranking of differences.

    Args:
        a, b: features `[N, D]` and `[M, D]`.
        differences: the differences, largest first.
        png: the file to write.
        names: names of the samples.
        unit: unit of the differences.
        pixels: differences `[H, W]` of images, drawn as an additional map.

    Raises:
        InputError: the file cannot be written.
    """
    panels = 2 if pixels is None else 3
    figure = Figure(figsize=(5.6 * panels, 5), layout="constrained")
    axes = figure.subplots(1, panels)
    figure.suptitle(title, fontsize=11)
    _draw_projection(axes[0], a, b, names)
    _draw_ranking(axes[1], differences, names, unit)
    if pixels is not None:
        shown = axes[2].imshow(pixels, cmap="magma", vmin=0)
        axes[2].set(title="where pixels differ", xticks=[], yticks=[])
        figure.colorbar(shown, ax=axes[2], label=unit, shrink=0.8)
    try:
        figure.savefig(png, dpi=130)
    except OSError as error:
        raise InputError(f"{png} cannot be written: {error.strerror or error}") from None
    return png


def project(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates `[N, 2]` and `[M, 2]` along the principal components of the union of A and B, and their variance.

    Both samples have equal weight in the components, whatever their sizes.
    """
    middle = (a.mean(0) + b.mean(0)) / 2
    a, b = a - middle, b - middle
    _, values, directions = np.linalg.svd(
        np.concatenate([a / np.sqrt(len(a)), b / np.sqrt(len(b))]), full_matrices=False
    )
    directions = np.pad(directions[:2], ((0, max(0, 2 - len(directions))), (0, 0)))
    fractions = np.pad(values**2, (0, 2))[:2] / max(np.sum(values**2), np.finfo(float).tiny)
    return a @ directions.T, b @ directions.T, fractions


def _draw_projection(axes: Axes, a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    a, b = (x[rng.permutation(len(x))[:_POINTS]] for x in (a, b))
    points_a, points_b, fractions = project(a, b)
    size = float(np.clip(4000 / (len(a) + len(b)), 4, 25))
    for points, colour in zip((points_a, points_b), COLOURS, strict=True):
        axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.5, linewidths=0)
        x, y = points.mean(0)
        axes.scatter(x, y, s=160, color=colour, marker="X", edgecolors="white", linewidths=1.5, zorder=3)
    axes.set(
        title="both samples in two dimensions; X is the mean",
        xlabel=f"first principal direction ({fractions[0]:.0%} of variance)",
        ylabel=f"second ({fractions[1]:.0%})",
    )
    tidy(axes, grid=False)
    marks = [axes.scatter([], [], s=40, color=colour) for colour in COLOURS]
    axes.legend(marks, names, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_ranking(axes: Axes, differences: list[Difference], names: tuple[str, str], unit: str) -> None:
    places = range(len(differences))
    axes.barh(places, [d.size for d in differences], color=[COLOURS[d.more_in_b] for d in differences])
    axes.set_yticks(places, [d.name.replace("$", r"\$") for d in differences])  # a dollar would start a formula
    axes.invert_yaxis()
    for colour, name in zip(COLOURS, names, strict=True):
        axes.barh([0], [0], color=colour, label=f"more in {name}")
    axes.set(title="what differs most", xlabel=unit)
    tidy(axes, grid=False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
