"""Draws what choosing otherwise gains: KL by density, of orders of keys, estimates and block sizes.

python -m bench choice_curves [--output docs/choice-curves.png]

From the files of `bench.choice` in bench/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unisparse_flex.reports.figures.style import save, tidy

from ..choice import curve, default_kl
from ..record import FOLDER
from .style import COLORS, DASHES, MARKERS

TRIALS = {
    "none/r4+p16": "the default",
    "none/r128": "true masses",
    "weight@1024/r128^2": "true masses, root mean square, keys sorted",
    "weight1@1024/r4+p16": "the default's estimate, keys sorted",
    "none/r4+p16#128x64": "the default's estimate, blocks of 64 keys",
    "heavy128x1@1024/r4+p16": "the default's estimate, heaviest keys apart",
}
FINALISTS = {
    "none/r4+p16": "the default",
    "none/r4+p16#128x64": "blocks of 64 keys",
    "none/r4+p16#128x32": "blocks of 32 keys",
    "heavy128x1@1024/r4+p16": "heaviest keys apart",
    "heavy128x1<11@1024/r4+p16": "heaviest keys apart in 11 of 30 layers",
    "heavy128x1@1024/r4+p16#128x64": "heaviest keys apart, blocks of 64 keys",
}
# Files of a row, what they show, and its lines.
ROWS = (
    (
        {
            "choice-smollm2-8192.json": "SmolLM2-135M, 8192 tokens, 3 excerpts",
            "choice-gemma3-270m-32768.json": "Gemma 3 270M, 32768 tokens, 2 excerpts",
        },
        TRIALS,
    ),
    (
        {
            "choice-smollm2-8192-excerpts.json": "SmolLM2-135M, 8192 tokens, 12 excerpts",
            "choice-gemma3-270m-32768-excerpts.json": "Gemma 3 270M, 32768 tokens, 6 excerpts",
        },
        FINALISTS,
    ),
)
TICKS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench choice_curves", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("docs/choice-curves.png"))
    options = parser.parse_args(arguments)
    rows = [
        ({title: json.loads((FOLDER / name).read_text()) for name, title in files.items()}, lines)
        for files, lines in ROWS
    ]
    draw(rows, options.output)
    print(f"drawn {options.output}")


def draw(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], output: Path) -> None:
    """A panel for each file, a line for each choice, the default's own setting and a quarter."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.choice_curves: needs matplotlib") from error

    figure = Figure(figsize=(9.2, 4.0 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(rows[0][0]), squeeze=False)
    for line_of_panels, (results, lines) in zip(panels, rows, strict=True):
        for axes, (title, result) in zip(line_of_panels, results.items(), strict=True):
            _draw_panel(axes, result, lines)
            axes.set_title(title, fontsize=10)
        line_of_panels[0].set_ylabel("KL to dense attention, nats")
        named: dict[str, Any] = {}
        for axes in line_of_panels:
            handles, names = axes.get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        shown = [name for name in lines.values() if name in named]
        line_of_panels[-1].legend(
            [named[name] for name in shown], shown, fontsize=7, frameon=False, loc="upper right"
        )
    save(figure, output)


def _draw_panel(axes: Any, result: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    found = {choice: curve(result, choice) for choice in lines}
    for place, (choice, name) in enumerate(lines.items()):
        if not found[choice]:
            continue
        style: dict[str, Any] = {"markersize": 4, "label": name}
        axes.plot(
            [point.density for point in found[choice]],
            [point.kl for point in found[choice]],
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle=DASHES[place % len(DASHES)],
            **style,
        )
    kl = [point.kl for points in found.values() for point in points]
    usual = default_kl(result)
    if usual is not None:
        for part in (1.0, 0.25):
            axes.axhline(part * usual, color="#999999", linewidth=0.7, linestyle=":")
        kl.append(usual / 4)
    axes.set_xlabel("blocks kept")
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_ylim(0.9 * min(kl), 1.1 * max(kl))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color="#dddddd", linewidth=0.6)
    tidy(axes)


if __name__ == "__main__":
    main()
