"""Draws what tile order saves on patches of real clips: error by density, raster against tiles.

python -m bench tile_orders [--output docs/video-orders.png] [--selector unisparse-paper]

From bench/results/video-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unisparse_flex.reports.figures.style import save, tidy

from ..record import FOLDER
from .style import COLORS, DASHES, MARKERS

FILE = "video-cpu.json"
ORDERS = {
    "raster": "raster order",
    "tile 2x8x8": "tiles of 2 x 8 x 8, no cells",
    "tile 4x4x8, cell 2x2x2": "tiles of 4 x 4 x 8 with cells",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench tile_orders", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("docs/video-orders.png"))
    parser.add_argument("--selector", default="unisparse-paper")
    options = parser.parse_args(arguments)
    draw(json.loads((FOLDER / FILE).read_text()), options.selector, options.output)
    print(f"drawn {options.output}")


def draw(result: dict[str, Any], selector: str, output: Path) -> None:
    """A panel for each clip, a line for each order."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.tile_orders: needs matplotlib") from error

    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(result["clips"]), sharey=True)
    for axes, clip in zip(panels, result["clips"], strict=True):
        for place, (order, name) in enumerate(ORDERS.items()):
            points = sorted(
                (row["density"], row["relative_error"])
                for row in result["rows"]
                if (row["clip"], row["selector"], row["order"]) == (clip, selector, order)
            )
            if points:
                density, error = zip(*points, strict=True)
                style: dict[str, Any] = {
                    "color": COLORS[place],
                    "marker": MARKERS[place],
                    "markersize": 5,
                }
                axes.plot(density, error, linestyle=DASHES[place], label=name, **style)
        axes.set_title(clip, fontsize=10)
        axes.set_xlabel("blocks kept")
        axes.set_yscale("log")
        axes.set_yticks([0.02, 0.05, 0.1, 0.2], ["2%", "5%", "10%", "20%"])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(color="#dddddd", linewidth=0.6)
        tidy(axes)
    panels[0].set_ylabel("error of the output")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    save(figure, output)


if __name__ == "__main__":
    main()
