"""Draws the time to the first token on several devices, dense and sparse.

python -m bench devices [--output docs/devices.png]

From bench/results/distributed-cuda-sm90-*.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisparse_flex.reports.figures.style import save, tidy

from ..record import FOLDER
from .style import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = "distributed-cuda-sm90-*.json"
# What each part of `bench.distributed` spreads over the devices.
PARTS = {"tensor_parallel": "heads over devices", "context_model": "tokens over devices"}
COLOURS = {"dense": "#8a8a8a", "sparse": COLORS[0]}
LABELS = {"dense": "dense", "sparse": "sparse, 10% of the blocks forced"}
WIDTH = 0.38


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench devices", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("docs/devices.png"))
    options = parser.parse_args(arguments)
    rows = [
        row
        for path in sorted(FOLDER.glob(FILES))
        for row in json.loads(path.read_text())["rows"]
        if "ms" in row
    ]
    draw(rows, options.output)
    print(f"drawn {options.output}")


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """A panel for each of `PARTS`, a pair of bars for each number of devices."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.devices: needs matplotlib") from error

    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    for axes, (part, title) in zip(figure.subplots(1, len(PARTS)), PARTS.items(), strict=True):
        _draw_part(axes, [row for row in rows if row["part"] == part], title)
    figure.axes[0].set_ylabel("seconds to the first token")
    figure.axes[0].legend(fontsize=8, frameon=False)
    save(figure, output)


def _draw_part(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    seconds = {(row["ranks"], row["variant"]): row["ms"] / 1e3 for row in rows}
    ranks = sorted({rank for rank, _ in seconds})
    for place, variant in enumerate(COLOURS):
        for x, rank in enumerate(ranks):
            value = seconds[rank, variant]
            text = f"{value:.3g} s"
            if variant == "sparse":
                text += f"\n({seconds[rank, 'dense'] / value:.2f}x)"
            at = x + (place - 0.5) * WIDTH
            label = LABELS[variant] if x == 0 else None
            axes.bar(at, value, WIDTH, color=COLOURS[variant], label=label)
            up: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(text, (at, value), (0, 3), **up)
    axes.set_xticks(range(len(ranks)), [f"{rank} GPU{'s' * (rank > 1)}" for rank in ranks])
    axes.set_title(f"{rows[0]['tokens']:,} tokens, {title}", fontsize=10)
    axes.margins(y=0.18)
    tidy(axes)


if __name__ == "__main__":
    main()
