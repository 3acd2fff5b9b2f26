"""Draws what choosing otherwise gains: KL by density, of orders of keys, estimates and block sizes.

python -m bench choice_curves [--output docs/choice-curves.png]

From the files of `bench.choice` in bench/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unisparse_flex.reports.figures.style import save, tidy

from ..choice import curve
from ..record import FOLDER
from .style import COLORS, DASHES, MARKERS

FILES = {
    "choice-smollm2-8192.json": "SmolLM2-135M, 8192 tokens",
    "choice-gemma3-270m-32768.json": "Gemma 3 270M, 32768 tokens",
}
LINES = {
    "none/r4+p16": "the default",
    "none/r128": "true masses",
    "weight@1024/r128^2": "true masses, root mean square, keys sorted",
    "weight1@1024/r4+p16": "the default's estimate, keys sorted",
    "none/r4+p16#128x64": "the default's estimate, blocks of 64 keys",
    "heavy128x1@1024/r4+p16": "the default's estimate, heaviest keys apart",
}
TICKS = (0.002, 0.003, 0.005, 0.01, 0.02, 0.03)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench choice_curves", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("docs/choice-curves.png"))
    options = parser.parse_args(arguments)
    results = {title: json.loads((FOLDER / name).read_text()) for name, title in FILES.items()}
    draw(results, options.output)
    print(f"drawn {options.output}")


def draw(results: dict[str, Any], output: Path) -> None:
    """A panel for each model, a line for each choice."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.choice_curves: needs matplotlib") from error

    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    panels = figure.subplots(1, len(results))
    for axes, (title, result) in zip(panels, results.items(), strict=True):
        for place, (choice, name) in enumerate(LINES.items()):
            points = curve(result, choice)
            if not points:
                continue
            style: dict[str, Any] = {"markersize": 4, "label": name}
            axes.plot(
                [point.density for point in points],
                [point.kl for point in points],
                color=COLORS[place % len(COLORS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle=DASHES[place % len(DASHES)],
                **style,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("blocks kept")
        axes.set_yscale("log")
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        kl = [point.kl for choice in LINES for point in curve(result, choice)]
        axes.set_ylim(0.9 * min(kl), 1.1 * max(kl))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(color="#dddddd", linewidth=0.6)
        tidy(axes)
    panels[0].set_ylabel("KL to dense attention, nats")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, output)


if __name__ == "__main__":
    main()
