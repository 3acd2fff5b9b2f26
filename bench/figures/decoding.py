"""Draws the KL of sparse decoding by the keys kept, for the library's summaries and others.

python -m bench decoding [--output docs/decoding.png]

From bench/results/decode-smollm2-8192-cpu.json and decode-gemma3-270m-32768-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from unisparse_flex.reports.figures.style import save, tidy

from ..record import FOLDER
from .style import COLORS, DASHES, MARKERS

FILES = {
    "SmolLM2-135M, 8192 tokens": "decode-smollm2-8192-cpu.json",
    "Gemma 3 270M, 32768 tokens": "decode-gemma3-270m-32768-cpu.json",
}
UNIT, RIVAL_PAGE = 32, 128
LINES = {
    "quest": "Quest's bounds",
    "mean": "mean",
    "unisparse": "mean and spread in 8 bits",
    "oracle": "true masses, a bound",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench decoding", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("docs/decoding.png"))
    options = parser.parse_args(arguments)
    draw(
        {title: json.loads((FOLDER / file).read_text()) for title, file in FILES.items()},
        options.output,
    )
    print(f"drawn {options.output}")


def draw(results: Mapping[str, Any], output: Path) -> None:
    """A panel for each model, a line for each summary, a star for Quest's pages."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.decoding: needs matplotlib") from error

    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, result) in zip(panels, results.items(), strict=True):
        for place, (summary, name) in enumerate(LINES.items()):
            points = points_of(result["rows"], summary, UNIT)
            line = list(zip(*points, strict=True))
            style: dict[str, Any] = {"color": COLORS[place], "marker": MARKERS[place]}
            axes.plot(*line, linestyle=DASHES[place], markersize=5, label=name, **style)
        for kept, kl in points_of(result["rows"], "quest", RIVAL_PAGE):
            label = f"Quest's bounds, pages of {RIVAL_PAGE}"
            axes.plot(kept, kl, "*", color=COLORS[0], markersize=10, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("keys kept")
        axes.set_yscale("log")
        axes.set_xticks([0.05, 0.1, 0.15, 0.2], ["5%", "10%", "15%", "20%"])
        axes.grid(color="#dddddd", linewidth=0.6)
        tidy(axes)
    panels[0].set_ylabel("KL to dense decoding")
    panels[-1].legend(fontsize=8, frameon=False)
    save(figure, output)


def points_of(
    rows: Sequence[Mapping[str, Any]], summary: str, unit: int
) -> list[tuple[float, float]]:
    """Keys kept and KL by rising share, means over texts, after dense prefill."""
    found: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        place = (row["summary"], row.get("unit"), row["prefill"])
        if place == (summary, unit, "dense") and row.get("share") and "kl" in row:
            found.setdefault(row["share"], []).append(row)
    return [
        (mean(row["kept"] for row in found[share]), mean(row["kl"] for row in found[share]))
        for share in sorted(found)
    ]


if __name__ == "__main__":
    main()
