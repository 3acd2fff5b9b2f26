"""Colours that survive colour blindness and grey print, and how a figure is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
DPI = 200
# Of one hue, far apart in lightness.
KEPT, DROPPED, HIDDEN = "#08306b", "#d6dbe2", "#ffffff"
# Okabe and Ito's palette, without its yellow, which print loses.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
FAINT = "#666666"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def tidy(axes: Axes) -> None:
    """Takes away what carries nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.set_axisbelow(True)
