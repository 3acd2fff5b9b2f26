"""Curves and tables from the files of `bench.quality`.

python -m bench.quality_tables [FILE ...] [--plots docs]
python -m bench.quality_tables --page docs/selectors.md

Without files, those in bench/results. Tables go to the screen, plots into a folder as PNG; or the
tables of a page are written anew, as `bench.tables` does.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from .tables import COLORS, DASHES, FOLDER, MARKERS, fill, interpolate, markdown

OURS = "unisparse-default"
# Whose density ours is compared with, at equal KL.
RIVALS = ("unisparse-paper", "xattention", "oracle")
# The densities of a rival at which the comparison is made.
DENSITIES = (0.2, 0.3, 0.4, 0.5)

Result = dict[str, Any]


class Point(NamedTuple):
    """One setting of a selector on one text, mean over excerpts."""

    density: float
    kl: float
    perplexity_ratio: float
    parameters: str


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="where PNGs go")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--page", type=Path, help="writes the tables of this page, and no plots")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(fill(options.page.read_text(), describe))
        return
    files = options.files or sorted(FOLDER.glob("quality-*.json"))
    if not files:
        raise SystemExit(f"bench.quality_tables: no quality-*.json in {FOLDER}")
    for path in files:
        result = json.loads(path.read_text())
        print(describe(result, path.name))
        if not options.no_plots:
            print(f"plotted {draw(result, options.plots)}\n")


def curve(result: Result, selector: str, text: str) -> list[Point]:
    """The points of one selector on one text, by density."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["selector"] == selector and row.get("text") == text and "kl" in row:
            settings.setdefault(row["parameters"], []).append(row)

    def average(rows: list[dict[str, Any]], name: str) -> float:
        return mean(row[name] for row in rows)

    return sorted(
        Point(
            density=average(rows, "density"),
            kl=average(rows, "kl"),
            perplexity_ratio=average(rows, "perplexity_ratio"),
            parameters=parameters,
        )
        for parameters, rows in settings.items()
    )


def density_at(points: Sequence[Point], kl: float) -> float | None:
    """The density at which a curve has this KL, between two points in its logarithm."""
    for few, many in pairwise(points):
        if min(few.kl, many.kl) > 0 and many.kl <= kl <= few.kl:
            span = math.log(few.kl) - math.log(many.kl)
            part = 0.0 if span == 0 else (math.log(few.kl) - math.log(kl)) / span
            return few.density + part * (many.density - few.density)
    return None


def kl_at(points: Sequence[Point], density: float) -> float | None:
    """The KL of a curve at this density, between two points in its logarithm."""
    return interpolate([(point.density, point.kl) for point in points], density)


def texts_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in result["rows"] if row.get("text")))


def selectors_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["selector"] for row in result["rows"] if "kl" in row))


def describe(result: Result, name: str) -> str:
    """Every table of one file."""
    head = [
        f"{name}: {result['model']}, {result['tokens']} tokens, the last {result['judged']} of "
        f"them judged, {result['dtype']}, {result['device']}",
        f"`{shlex.join(result['command'])}`",
    ]
    if "stopped" in result:
        head.append(f"Stopped: {result['stopped']}.")
    tables = [("Density that gives the same KL", equal_kl_table(result))]
    tables += [(f"Curves on {text}", curves_table(result, text)) for text in texts_of(result)]
    tables.append(("Tasks", tasks_table(result)))
    parts = [part for title, table in tables if table for part in (f"### {title}", table)]
    return "\n\n".join([*head, *parts]) + "\n"


def equal_kl_table(result: Result) -> str:
    """Our density over a rival's at the KL that the rival has at some densities."""
    lines = []
    for text in texts_of(result):
        ours = curve(result, OURS, text)
        for rival in RIVALS:
            points = curve(result, rival, text)
            cells = []
            for density in DENSITIES:
                kl = kl_at(points, density)
                own = None if kl is None else density_at(ours, kl)
                cells.append("" if own is None else f"{own / density:.2f} (KL {kl:.4f})")
            if any(cells):
                lines.append([text, rival, *cells])
    head = ["text", "against", *(f"at its density {density:.2f}" for density in DENSITIES)]
    return markdown(head, lines)


def curves_table(result: Result, text: str) -> str:
    """Density, KL and perplexity ratio of every point."""
    lines = [
        [
            selector,
            f"{point.density:.3f}",
            f"{point.kl:.4f}",
            f"{point.perplexity_ratio:.3f}",
            f"`{point.parameters}`",
        ]
        for selector in selectors_of(result)
        for point in curve(result, selector, text)
    ]
    return markdown(["selector", "density", "KL", "perplexity ratio", "setting"], lines)


def tasks_table(result: Result) -> str:
    """Scores of every task, and the dense model's."""
    rows = [row for row in result["rows"] if "task_scores" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["task_scores"]))
    lines = [["dense", "", *(f"{rows[0]['dense_scores'][n]:.2f}" for n in names)]] if rows else []
    lines += [
        [
            row["selector"],
            f"`{row['parameters']}`",
            *(f"{row['task_scores'][n]:.2f}" for n in names),
        ]
        for row in rows
    ]
    return markdown(["selector", "setting", *names], lines)


def draw(result: Result, folder: Path) -> Path:
    """Plots KL against density, a panel per text."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.quality_tables: plots need matplotlib") from error

    texts, selectors = texts_of(result), selectors_of(result)
    figure = Figure(figsize=(4.2 * len(texts) + 2.0, 4.0), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for place, selector in enumerate(selectors):
            points = [p for p in curve(result, selector, text) if p.kl > 0]
            axes.plot(
                [point.density for point in points],
                [point.kl for point in points],
                color="#000000" if selector == "oracle" else COLORS[place % len(COLORS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle=DASHES[(place + place // len(COLORS)) % len(DASHES)],
                linewidth=2.4 if selector == OURS else 1.2,
                markersize=4,
                label=selector,
            )
        axes.set_yscale("log")
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("density")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL to dense")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{result['model']}, {result['tokens']} tokens", fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"quality-{result['model']}-{result['tokens']}.png"
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
