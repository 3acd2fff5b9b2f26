"""Plots speed against length, and from which length on sparse attention is the faster one.

python -m bench speed_plots [FILE ...] [--output docs/speed-by-length.png] [--shape llama3-8b]
    [--selector default]

Files are those of bench.attention, of bench.prefill for the time to first token, and of
bench.cost_decision, of whichever GPU, for the default: between which lengths the cost model turns
to sparse, and what it then gains or loses; without files, those in bench/results that measured
this selector. What they lack is not drawn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attention import Result, Row, density_name, density_order, join, sparse_rows
from ..calls import DEFAULT
from ..cost_decision import is_default, is_prompt
from ..record import FOLDER
from ..registry import files_of, read
from .curves import interpolate
from .style import COLORS, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Times of the whole sparse call, a panel each.
TIMES = {"total_ms": "inside a CUDA graph", "total_plain_ms": "launched from Python"}
# The dense variants of bench.prefill: colour, marker, dashes, and what they are called.
DENSE = {
    "dense_eager": ("#777777", "X", "--", "dense, eager"),
    "dense_compiled": ("#000000", "P", "-", "dense, compiled"),
}
FAINT = "#777777"
# Whose files are drawn.
BENCHMARKS = ("attention", "cost_decision", "prefill")


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From which length on sparse attention is at least as fast as dense.

    Attributes:
        tokens: That length; the shortest or the longest measured where ``side`` says so.
        side: ``"at"`` this length, ``"below"`` it, or only ``"above"`` it, if anywhere.
    """

    tokens: float
    side: str

    def __str__(self) -> str:
        if self.side == "at":
            return f"{self.tokens / 1024:.1f}k"
        return f"{self.side} {thousands(self.tokens)}"


@dataclass(frozen=True, slots=True)
class Curve:
    """The speed-up at one density.

    Attributes:
        density: As asked for; ``None`` is what the selector keeps by its own rule.
        points: Tokens and speed-up over the fastest dense kernel, by rising tokens.
    """

    density: float | None
    points: tuple[tuple[int, float], ...]

    @property
    def break_even(self) -> BreakEven:
        """Where the curve rises to 1 for good, straight between two points of logarithmic axes."""
        slower = [place for place, (_, speedup) in enumerate(self.points) if speedup < 1]
        if not slower:
            return BreakEven(self.points[0][0], "below")
        crossing = [(math.log(y), x) for x, y in self.points[slower[-1] :][:2]]
        tokens = interpolate(crossing, 0.0)
        if tokens is None:
            return BreakEven(self.points[-1][0], "above")
        return BreakEven(tokens, "at")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench speed_plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/speed-by-length.png"))
    parser.add_argument("--shape", default="llama3-8b", help="heads that are plotted")
    parser.add_argument("--selector", default=DEFAULT, help="settings that are plotted")
    options = parser.parse_args(arguments)
    results = [read([path])[path.name] for path in options.files] or committed(options.selector)
    if not results:
        raise SystemExit(f"bench.speed_plots: no files of {', '.join(BENCHMARKS)} in {FOLDER}")
    try:
        figure = draw(results, options.shape, options.selector)
    except ValueError as error:
        raise SystemExit(f"bench.speed_plots: {error}") from error
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=150)
    print(f"plotted {options.output}")


def committed(selector: str) -> list[Result]:
    """The files in bench/results that measured a selector, and those of the cost model."""
    return [
        result
        for result in read(files_of(*BENCHMARKS)).values()
        if any("decision" in row or row.get("selector") == selector for row in result["rows"])
    ]


def curves(result: Result, shape: str, selector: str, *, time: str = "total_ms") -> list[Curve]:
    """The speed-up of selection and attention over the fastest dense kernel, by density.

    Args:
        result: Of `bench.attention`.
        shape: Name of the heads.
        selector: Name of the settings.
        time: What a sparse call's time is, one of `TIMES`; the fastest backend's inside a graph.

    Returns:
        By rising density, the selector's own rule last; what was not timed is left out.
    """
    points: dict[float | None, dict[int, float]] = {}
    for row in sparse_rows(result, shape, selector):
        dense = row.get("dense_kernels")
        if dense and row.get(time):
            points.setdefault(row["density"], {})[row["tokens"]] = min(dense.values()) / row[time]
    return [
        Curve(density, tuple(sorted(points[density].items())))
        for density in sorted(points, key=density_order)
    ]


def first_token(rows: Sequence[Row], selector: str) -> dict[tuple[str, float | None], list[Row]]:
    """The timed rows of `bench.prefill`, dense or of a selector, by variant and density.

    Those of each are by rising tokens.
    """
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row.get("ms") and row.get("selector", selector) == selector:
            found.setdefault((row["variant"], row.get("density")), []).append(row)
    return found


def default_prompts(rows: Sequence[Row], shape: str) -> list[Row]:
    """The rows of `bench.cost_decision` of a bare call to the default with a whole prompt."""
    return sorted(
        (
            row
            for row in rows
            if row["shape"] == shape and not row["layers"] and is_prompt(row) and is_default(row)
        ),
        key=lambda row: row["tokens"],
    )


def decided(prompts: Sequence[Row]) -> tuple[int, int] | None:
    """Between which lengths the cost model turns sparse, by `default_prompts`.

    The longest that stays dense and the shortest that is sparse; ``None`` where there are no such
    two.
    """
    dense = [row["tokens"] for row in prompts if row["decision"] == "dense"]
    sparse = [row["tokens"] for row in prompts if row["decision"] == "sparse"]
    if not dense or not sparse or max(dense) > min(sparse):
        return None
    return max(dense), min(sparse)


def draw(results: Sequence[Result], shape: str, selector: str) -> Figure:
    """A panel for each of `TIMES`, and one with the time to first token of a whole model.

    Args:
        results: Files of one device: of `bench.attention`, and any of the others; those of
            `bench.cost_decision` may be of another.
        shape: Name of the heads.
        selector: Name of the settings.

    Raises:
        ValueError: The files are of different devices, did not pass the gate, or hold no speed-up
            of this shape and selector.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.speed_plots: plots need matplotlib") from error

    deciding = [result for result in results if any("decision" in row for row in result["rows"])]
    devices = dict.fromkeys(result["device"] for result in results if result not in deciding)
    if len(devices) > 1:
        raise ValueError(f"files must be of one device, got {', '.join(devices)}; name some")
    panels = _speedups(results, shape, selector)
    prefill = [result for result in results if any("variant" in row for row in result["rows"])]
    runs = first_token([row for result in prefill for row in result["rows"]], selector)
    drawn = {curve.density for found in panels.values() for curve in found}
    drawn |= {density for variant, density in runs if variant not in DENSE}
    ordered = sorted(drawn, key=density_order)
    styles = {density: _style(place) for place, density in enumerate(ordered)}

    widths = [1.0] * len(panels) + [0.75] * bool(runs)
    figure = Figure(figsize=(3.8 * sum(widths), 5.4), layout="constrained")
    title = f'{shape}, settings: {selector}, densities forced but for "own", {next(iter(devices))}'
    figure.suptitle(title, fontsize=11)
    every: list[Axes] = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    every[0].set_ylabel("speed-up over the fastest dense kernel")
    for axes in every[1 : len(panels)]:
        axes.sharey(every[0])
    for (time, found), axes in zip(panels.items(), every, strict=False):
        _draw_speedups(axes, found, styles)
        # Those calls were launched from Python.
        if time == "total_plain_ms":
            for result in deciding:
                _draw_decided(axes, default_prompts(result["rows"], shape), result["device"])
        axes.set_title(f"attention, {TIMES[time]}", fontsize=10)
        _legend(axes, "density: breaks even at (tokens)")
    if runs:
        _draw_first_token(every[-1], runs, styles)
        every[-1].set_title(f"whole model, {prefill[0]['model']['layers']} layers", fontsize=10)
        _legend(every[-1], "numbers: speed-up over dense", columns=1)
    return figure


def _speedups(results: Sequence[Result], shape: str, selector: str) -> dict[str, list[Curve]]:
    """The curves of each of `TIMES` that was measured."""
    attention = [r for r in results if any(row.get("stage") == "sparse" for row in r["rows"])]
    joined: Result = join(attention) if attention else {"rows": []}
    if attention and not joined["gate"].get("passed"):
        raise ValueError("the gate did not pass: no number may be plotted")
    found = {time: curves(joined, shape, selector, time=time) for time in TIMES}
    if not any(found.values()):
        raise ValueError(f"no file holds a speed-up of {selector} with the heads of {shape}")
    return {time: each for time, each in found.items() if each}


def thousands(tokens: float) -> str:
    """A measured length in units of 1024 tokens."""
    return f"{tokens / 1024:g}k"


def _style(place: int) -> dict[str, Any]:
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "markersize": 5,
    }


def _draw_speedups(
    axes: Axes, found: Sequence[Curve], styles: dict[float | None, dict[str, Any]]
) -> None:
    axes.axhline(1, color=FAINT, linewidth=1)
    for curve in found:
        name, style, even = density_name(curve.density), styles[curve.density], curve.break_even
        tokens, speedups = zip(*curve.points, strict=True)
        axes.plot(tokens, speedups, **style, label=f"{name}: {even}", gid=f"speed-up {name}")
        if even.side == "at":
            mark = style | {"linestyle": "none", "markersize": 8, "markerfacecolor": "white"}
            axes.plot([even.tokens], [1.0], **mark, zorder=3, gid=f"break-even {name}")
        elif even.side == "below":
            arrow = {"arrowstyle": "<-", "color": style["color"], "shrinkA": 0, "shrinkB": 3}
            start: dict[str, Any] = {"xytext": (-15, 0), "textcoords": "offset points"}
            axes.annotate("", curve.points[0], **start, arrowprops=arrow, gid=f"below {name}")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    _token_axis(axes, [tokens for curve in found for tokens, _ in curve.points])
    # Room for the arrows.
    axes.margins(x=0.1)
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
    axes.text(1, 0.02, "below 1x dense is faster", fontsize=8, **place)


def _draw_decided(axes: Axes, prompts: Sequence[Row], device: str) -> None:
    """The default's own times over dense where it runs sparse, and where it turns to that."""
    gpu = device.removeprefix("NVIDIA ").partition(" ")[0]
    points = [(row["tokens"], 1 / row["ratio"]) for row in prompts if row["decision"] == "sparse"]
    lengths = decided(prompts)
    if points:
        name = f"default, {gpu}"
        tokens, speedups = zip(*points, strict=True)
        label = f"{name}: {Curve(None, tuple(points)).break_even}"
        style: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 7, "linewidth": 1}
        axes.plot(tokens, speedups, **style, label=label, gid=f"decided {name}")
    if lengths is not None:
        axes.axvspan(*lengths, color="#e4e4e4", zorder=0, gid="decided")
        text = f"the default\nturns sparse\n({gpu})"
        place: dict[str, Any] = {
            "transform": axes.get_xaxis_transform(),
            "va": "top",
            "ha": "center",
        }
        axes.text(math.sqrt(math.prod(lengths)), 0.98, text, **place, fontsize=7)


def _draw_first_token(
    axes: Axes,
    runs: dict[tuple[str, float | None], list[Row]],
    styles: dict[float | None, dict[str, Any]],
) -> None:
    for (variant, density), rows in runs.items():
        points = [(row["tokens"], row["ms"] / 1e3) for row in rows]
        if variant in DENSE:
            color, marker, dashes, name = DENSE[variant]
            style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dashes}
        else:
            style, name = styles[density], f"{variant}, {density_name(density)}"
            for row, point in zip(rows, points, strict=True):
                if "speedup" in row:
                    text = f"{row['speedup']:.2f}x"
                    axes.annotate(text, point, (5, -3), textcoords="offset points", va="top")
        tokens, seconds = zip(*points, strict=True)
        axes.plot(tokens, seconds, **style, label=name, gid=f"seconds {name}")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.set_ylabel("time to first token")
    axes.margins(0.22, 0.1)
    _token_axis(axes, [row["tokens"] for rows in runs.values() for row in rows])


def _token_axis(axes: Axes, tokens: Sequence[int]) -> None:
    ticks = sorted(set(tokens))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [thousands(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, title: str, *, columns: int = 2) -> None:
    """Under the panel, where no curve is."""
    below: dict[str, Any] = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.14),
        "frameon": False,
        "handlelength": 3,
    }
    axes.legend(title=title, ncols=columns, fontsize=8, title_fontsize=8, **below)


if __name__ == "__main__":
    main()
