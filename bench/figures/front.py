"""Draws the picture of the front page, speed by length and quality by density, and the latter's.

python -m bench front [--folder docs]

From files in bench/results: attention-cuda-sm90*.json for speed, quality-smollm2-8192.json and
quality-gemma3-270m-32768.json for quality. Into front.png and quality-by-density.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from unisparse_flex.block_masks.selectors import QUALITIES
from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.reports.figures.style import FAINT, save, tidy

from ..attention import join, sparse_rows
from ..record import FOLDER
from .speed_plots import curves, thousands
from .style import COLORS, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]

FOLDER_OF_PAGES = Path("docs")
SPEED = "attention-cuda-sm90*.json"
QUALITY = {
    "quality-smollm2-8192.json": "SmolLM2-135M, 8192 tokens",
    "quality-gemma3-270m-32768.json": "Gemma 3 270M, 32768 tokens",
}
# Of the two texts that on which the default gains less.
TEXT = "code"
# Heads whose queries and keys are random, at densities of which `None` is the selector's own.
RANDOM = "llama3-8b"
FORCED: tuple[float | None, ...] = (0.1, 0.3, None)
# Layers whose queries and keys are those of a real prompt.
REAL = ("smollm2-layer-3", "smollm2-layer-15", "smollm2-layer-27")
SETTINGS = "two"
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
    _draw_speed(speed, load_speed())
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


def load_speed() -> Result:
    """The files of attention on the GPU, as one."""
    paths = sorted(FOLDER.glob(SPEED), key=lambda path: path.stem)
    return join([load(path.name) for path in paths])


def real_speedups(result: Result) -> list[tuple[str, int, float, float]]:
    """Of each real layer: name, tokens, density that the rule chose, speed-up of the whole call.

    The speed-up is over the fastest dense kernel of the run.
    """
    found = []
    for layer in REAL:
        for row in sparse_rows(result, layer, SETTINGS):
            if row["density"] is None:
                speedup = min(row["dense_kernels"].values()) / row["total_ms"]
                found.append((layer, row["tokens"], row["density_measured"], speedup))
    return found


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
    return f"{min(kept):.0%} to {max(kept):.0%}"


def _draw_speed(axes: Axes, result: Result) -> None:
    device = str(result["device"]).removeprefix("NVIDIA ").partition(" ")[0]
    axes.axhline(1, color=FAINT, linewidth=1)
    found = {curve.density: curve for curve in curves(result, RANDOM, SETTINGS)}
    for place, density in enumerate(FORCED):
        tokens, speedups = zip(*found[density].points, strict=True)
        free = density is None
        kept = f"{kept_by_rule(result)} by its rule" if free else f"{density:.0%} kept, forced"
        axes.plot(tokens, speedups, label=f"random inputs, {kept}", **_style(place))
    real = real_speedups(result)
    axes.plot(
        [tokens for _, tokens, _, _ in real],
        [speedup for *_, speedup in real],
        linestyle="none",
        marker="*",
        markersize=11,
        color="black",
        label="real prompt, by its rule " + ", ".join(f"{kept:.0%}" for _, _, kept, _ in real),
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ticks = sorted({tokens for density in FORCED for tokens, _ in found[density].points})
    axes.set_xticks(ticks, [thousands(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.8, 32)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over the fastest dense kernel")
    axes.set_title(f"Attention with its selection, {device}", fontsize=10)
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
