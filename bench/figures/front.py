"""Draws the picture of the front page, speed by length and quality by density, and the latter's.

python -m bench front [--folder docs]

From files in bench/results: attention-cuda-sm90-default.json and real-prompts-cuda-sm90.json for
speed, quality-smollm2-8192.json and quality-gemma3-270m-32768.json for quality. Into front.png and
quality-by-density.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from unisparse_flex.block_masks.selectors import QUALITIES
from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.reports.figures.style import FAINT, save, tidy

from ..attention import sparse_rows
from ..real_prompts import whole_models
from ..record import FOLDER
from .speed_plots import curves, thousands
from .style import COLORS, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]

FOLDER_OF_PAGES = Path("docs")
SPEED, REAL = "attention-cuda-sm90-default.json", "real-prompts-cuda-sm90.json"
QUALITY = {
    "quality-smollm2-8192.json": "SmolLM2-135M, 8192 tokens",
    "quality-gemma3-270m-32768.json": "Gemma 3 270M, 32768 tokens",
}
# Of the two texts that on which the default gains less.
TEXT = "code"
# Heads whose queries and keys are random, at densities of which `None` is the selector's own.
RANDOM = "llama3-8b"
FORCED: tuple[float | None, ...] = (0.1, 0.35, None)
# Whose real queries and keys attention reads: what they are called, and how they are drawn.
HEADS = {
    "llama3-8b": ("SmolLM2's in Llama-3.1-8B's heads", "*"),
    "smollm2": ("SmolLM2-135M", "P"),
    "gemma3-270m": ("Gemma 3 270M", "X"),
}
SETTINGS = "default"
NAMES = {
    "unisparse-default": "this package",
    "unisparse-paper": "UniSparse (paper)",
    "xattention": "XAttention",
    "flexprefill": "FlexPrefill",
    "minference": "MInference",
    "flashprefill": "FlashPrefill",
    "streamingllm": "StreamingLLM",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench front", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=FOLDER_OF_PAGES)
    folder = parser.parse_args(arguments).folder
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.front: needs matplotlib") from error

    first, second = QUALITY.items()
    front = Figure(figsize=(9.2, 4.4), layout="constrained")
    speed, quality = front.subplots(1, 2)
    _draw_speed(speed, load(SPEED))
    _draw_quality(quality, *first)
    save(front, folder / "front.png")
    both = Figure(figsize=(9.2, 4.4), layout="constrained")
    for axes, each in zip(both.subplots(1, 2, sharey=True), (first, second), strict=True):
        _draw_quality(axes, *each)
    both.axes[1].set_ylabel("")
    save(both, folder / "quality-by-density.png")
    print(f"drawn {folder}/front.png and {folder}/quality-by-density.png")


def load(name: str) -> Result:
    """One file of bench/results."""
    result: Result = json.loads((FOLDER / name).read_text())
    return result


def real_prompts() -> dict[str, list[dict[str, Any]]]:
    """Of each model in `HEADS` a row for each text: all layers as one, at the default setting."""
    rows = [row for row in whole_models(load(REAL)) if row["quality"] == "balanced"]
    return {name: [row for row in rows if row["model"] == name] for name in HEADS}


def gpu_of(result: Result) -> str:
    """What a GPU is called in short."""
    return str(result["device"]).removeprefix("NVIDIA ").partition(" ")[0]


def quality_points(result: Result, selector: str, text: str) -> list[tuple[float, float, str]]:
    """Density, KL and setting of every point, mean over excerpts, by density."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if (row["selector"], row.get("text")) == (selector, text) and "kl" in row:
            settings.setdefault(row["parameters"], []).append(row)
    return sorted(
        (mean(row["density"] for row in rows), mean(row["kl"] for row in rows), setting)
        for setting, rows in settings.items()
    )


def kept_by_rule(result: Result) -> str:
    """From the least to the most that the settings' own rule keeps of random inputs."""
    rows = [row for row in sparse_rows(result, RANDOM, SETTINGS) if row["density"] is None]
    kept = [row["density_measured"] for row in rows]
    return span(kept)


def span(shares: Iterable[float]) -> str:
    """From the least to the most, in whole percents."""
    found = list(shares)
    return f"{min(found):.0%} to {max(found):.0%}"


def _draw_speed(axes: Axes, result: Result) -> None:
    axes.axhline(1, color=FAINT, linewidth=1)
    found = {curve.density: curve for curve in curves(result, RANDOM, SETTINGS)}
    for place, density in enumerate(FORCED):
        tokens, speedups = zip(*found[density].points, strict=True)
        free = density is None
        kept = f"{kept_by_rule(result)} by its rule" if free else f"{density:.0%} kept, forced"
        axes.plot(tokens, speedups, label=f"random inputs, {kept}", **_style(place))
    for name, rows in real_prompts().items():
        title, marker = HEADS[name]
        kept = span(row["density"] for row in rows)
        axes.plot(
            [row["tokens"] for row in rows],
            [row["speedup"] for row in rows],
            linestyle="none",
            marker=marker,
            markersize=8,
            color="black",
            label=f"real, {title}: {kept}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ticks = sorted({tokens for density in FORCED for tokens, _ in found[density].points})
    axes.set_xticks(ticks, [thousands(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.8, 48)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over the fastest dense kernel")
    axes.set_title(f"Attention with its selection, {gpu_of(result)}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _finish(axes)


def _draw_quality(axes: Axes, name: str, title: str) -> None:
    result = load(name)
    for place, (selector, label) in enumerate(NAMES.items()):
        points = quality_points(result, selector, TEXT)
        if not points:
            continue
        density, kl, settings = zip(*points, strict=True)
        style = _style(place) | {"linewidth": 1.2 if place else 2.5}
        axes.plot(density, kl, label=label, zorder=10 - place, **style)
        if not place:
            _mark_qualities(axes, density, kl, settings)
    axes.set_yscale("log")
    axes.set_xlim(0.05, 0.85)
    axes.set_ylim(0.001, 0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("blocks kept")
    axes.set_ylabel("KL to the dense model (less is better)")
    axes.set_title(f"{title} of {TEXT}, real weights", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    _finish(axes)


def _mark_qualities(
    axes: Axes, density: Sequence[float], kl: Sequence[float], settings: Sequence[str]
) -> None:
    for x, y, setting in zip(density, kl, settings, strict=True):
        for word, threshold in QUALITIES.items():
            if getattr(decode_selector(setting), "threshold", None) == threshold:
                place: dict[str, Any] = {
                    "textcoords": "offset points",
                    "ha": "right",
                    "color": COLORS[0],
                }
                axes.annotate(word, (x, y), (-8, -9), fontsize=9, weight="bold", **place)
                axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", color=COLORS[0])


def _style(place: int) -> dict[str, Any]:
    colours = (*COLORS, "#000000")
    return {
        "color": colours[place],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "markersize": 5,
    }


def _finish(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    tidy(axes)


if __name__ == "__main__":
    main()
