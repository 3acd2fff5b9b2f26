"""The tables of the files of `bench.video`: errors at matched density, by order of the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import markdown
from ..figures import interpolate

DENSITIES = (0.2, 0.3, 0.4, 0.5)
BASELINE = "raster"
CLIPS = ("clip", "grid", "tokens", "pixels of a patch", "shrunk by")

Result = dict[str, Any]
# (density, relative error) of one selector in one order on one clip.
Curve = list[tuple[float, float]]


def describe(result: Result, name: str) -> str:
    """Every table of one file."""
    title = f"{name}: {result['device']}, torch {result['versions'].get('torch')}"
    refused = ", ".join(result["causal_only"])
    parts = [
        *markdown.heading(f"{title}, {result['seconds']:.0f} s", result),
        f"Weights: {result['weights']}. Rows judged: {result['judged_rows']} of every head.",
        f"Not defined without causality, and so left out: {refused}.",
        clip_table(result),
        "### Error over that in raster order, at the same density",
        ratio_table(result),
    ]
    for clip in result["clips"]:
        parts += [f"### {clip}: relative error of the output", error_table(result, clip)]
    return markdown.page(*parts)


def clip_table(result: Result) -> str:
    """What each clip was cut into, and how sharp its heads are."""
    lines = []
    for name, clip in result["clips"].items():
        shares = ", ".join(f"{share:.1%}" for share in clip["effective_keys"])
        line = [name, _by(clip["grid"]), clip["tokens"], _by(clip["patch"]), clip["shrink"]]
        lines.append([*line, shares])
    columns = (*CLIPS, "keys a row attends to, by head")
    return markdown.table(dict.fromkeys(columns, "{}"), lines)


def ratio_table(result: Result) -> str:
    """Geometric mean over clips of an order's error over raster order's."""
    lines = []
    for selector, order in dict.fromkeys((s, o) for _, s, o in read_curves(result)):
        if order == BASELINE:
            continue
        means = [ratio_at(result, selector, order, density) for density in DENSITIES]
        lines.append([selector, order, *means])
    return _by_density(lines, "{:.2f}")


def ratio_at(result: Result, selector: str, order: str, density: float = 0.3) -> float | None:
    """That mean at one density; ``None`` where a clip has no error on both sides."""
    curves = read_curves(result)
    logs = []
    for clip in result["clips"]:
        error = interpolate(curves.get((clip, selector, order), []), density)
        base = interpolate(curves.get((clip, selector, BASELINE), []), density)
        if error is None or base is None:
            return None
        logs.append(math.log(error / base))
    return math.exp(sum(logs) / len(logs))


def error_table(result: Result, clip: str) -> str:
    """Relative error at each density, by selector and order."""
    lines = []
    for (name, selector, order), curve in read_curves(result).items():
        if name == clip:
            errors = [interpolate(curve, density) for density in DENSITIES]
            lines.append([selector, order, *errors])
    return _by_density(lines, "{:.3f}")


def read_curves(result: Result) -> dict[tuple[str, str, str], Curve]:
    """Curves by clip, selector and order, each by rising density."""
    curves: dict[tuple[str, str, str], Curve] = {}
    for row in result["rows"]:
        curve = curves.setdefault((row["clip"], row["selector"], row["order"]), [])
        curve.append((row["density"], row["relative_error"]))
    return {key: sorted(curve) for key, curve in curves.items()}


def _by_density(lines: list[list[Any]], form: str) -> str:
    """A table of numbers at `DENSITIES`, sorted by selector."""
    columns = {"selector": "{}", "order": "{}", **{f"{d:.0%}": form for d in DENSITIES}}
    return markdown.table(columns, sorted(lines, key=lambda line: line[0]))


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
