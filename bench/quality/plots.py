"""Plots of the curves of one file of `bench.quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import COLORS, DASHES, MARKERS
from .curves import Result, curve, selectors_of, texts_of

# One more of each than lines that are compared with the oracle, whose own is black.
LINE_COLORS = (*COLORS, "#777777")
LINE_MARKERS = (*MARKERS, "X", "*")

# What is drawn against density, a row of panels each, where the file holds it.
MEASURES = {
    "kl": "KL to dense",
    "recall": "recall",
    "output_error": "error of the output",
    "selection_share": "selection's share of time",
}


def draw(result: Result, path: Path, *, emphasized: str) -> None:
    """Plots every measure against density, a column of panels per text.

    Args:
        result: The file.
        path: The PNG that is written.
        emphasized: The selector whose line is thick.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.quality: plots need matplotlib") from error

    texts = texts_of(result)
    measures = [name for name in MEASURES if any(name in row for row in result["rows"])]
    size = (4.2 * len(texts) + 2.0, 4.0 + 2.6 * (len(measures) - 1))
    figure = Figure(figsize=size, layout="constrained")
    heights = [3.4, *[2.4] * (len(measures) - 1)]
    panels = figure.subplots(
        len(measures), len(texts), sharex="col", sharey="row", squeeze=False, height_ratios=heights
    )
    for measure, row in zip(measures, panels, strict=True):
        row[0].set_ylabel(MEASURES[measure])
        for axes, text in zip(row, texts, strict=True):
            _draw_panel(axes, result, text, measure, emphasized)
    for axes, text in zip(panels[0], texts, strict=True):
        axes.set_yscale("log")
        axes.set_title(text, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("density")
    figure.align_ylabels()
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{result['model']}, {result['tokens']} tokens", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, result: Result, text: str, measure: str, emphasized: str) -> None:
    selectors = selectors_of(result)
    others = [selector for selector in selectors if selector != "oracle"]
    colors = {name: LINE_COLORS[i % len(LINE_COLORS)] for i, name in enumerate(others)}
    for place, selector in enumerate(selectors):
        found = [(p.density, getattr(p, measure)) for p in curve(result, selector, text)]
        points = [(x, y) for x, y in found if y is not None and (y > 0 or measure != "kl")]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colors.get(selector, "#000000"),
            marker=LINE_MARKERS[place % len(LINE_MARKERS)],
            linestyle=DASHES[(place + place // len(DASHES)) % len(DASHES)],
            linewidth=2.4 if selector == emphasized else 1.2,
            markersize=4,
            label=selector,
        )
    if measure != "kl":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    if measure == "selection_share":
        axes.set_ylim(0, 1)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
