"""How plots of every room look: colours, markers and axes."""

from typing import Any

# Colours for colour-blind readers (Okabe and Ito), each with a marker.
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
MARKERS = "osD^vPX*h"


def tidy(*all_axes: Any, grid: bool = True) -> None:
    """Removes the frame above and beside plots, and adds a light grid."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(alpha=0.25)
