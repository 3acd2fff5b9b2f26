"""Markdown tables of bench.video's files: errors at matched density, by order of the tokens.

python -m bench.video_tables [FILE]
python -m bench.video_tables --page docs/video.md
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import fill, interpolate, markdown
from .video import OUTPUT

DENSITIES = (0.2, 0.3, 0.4, 0.5)
BASELINE = "raster"

Result = dict[str, Any]
# (density, relative error) of one selector in one order on one clip.
Curve = list[tuple[float, float]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.video_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, default=OUTPUT)
    parser.add_argument("--page", type=Path, help="writes the tables of this page")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(fill(options.page.read_text(), describe))
        return
    print(describe(json.loads(options.file.read_text()), options.file.name))


def describe(result: Result, name: str) -> str:
    """Every table of one file."""
    parts = [
        f"{name}: {result['device']}, torch {result['versions'].get('torch')}, "
        f"{result['seconds']:.0f} s",
        f"`{shlex.join(result['command'])}`",
        f"Weights: {result['weights']}. Rows judged: {result['judged_rows']} of every head.",
    ]
    if "stopped" in result:
        parts.append(f"Stopped: {result['stopped']}.")
    refused = ", ".join(result["causal_only"])
    parts += [
        f"Not defined without causality, and so left out: {refused}.",
        clip_table(result),
        "### Error over that in raster order, at the same density",
        ratio_table(result),
    ]
    for clip in result["clips"]:
        parts += [f"### {clip}: relative error of the output", error_table(result, clip)]
    return "\n\n".join(parts) + "\n"


def clip_table(result: Result) -> str:
    """What each clip was cut into, and how sharp its heads are."""
    lines = []
    for name, clip in result["clips"].items():
        shares = ", ".join(f"{share:.1%}" for share in clip["effective_keys"])
        line = [name, _by(clip["grid"]), str(clip["tokens"]), _by(clip["patch"])]
        lines.append([*line, str(clip["shrink"]), shares])
    head = ["clip", "grid", "tokens", "pixels of a patch", "shrunk by"]
    return markdown([*head, "keys a row attends to, by head"], lines)


def ratio_table(result: Result) -> str:
    """Geometric mean over clips of an order's error over raster order's."""
    lines = []
    for selector, order in dict.fromkeys((s, o) for _, s, o in read_curves(result)):
        if order == BASELINE:
            continue
        means = [ratio_at(result, selector, order, density) for density in DENSITIES]
        lines.append([selector, order, *("" if mean is None else f"{mean:.2f}" for mean in means)])
    return markdown(["selector", "order", *_heads()], sorted(lines, key=lambda line: line[0]))


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
            lines.append([selector, order, *("" if e is None else f"{e:.3f}" for e in errors)])
    return markdown(["selector", "order", *_heads()], sorted(lines, key=lambda line: line[0]))


def read_curves(result: Result) -> dict[tuple[str, str, str], Curve]:
    """Curves by clip, selector and order, each by rising density."""
    curves: dict[tuple[str, str, str], Curve] = {}
    for row in result["rows"]:
        curve = curves.setdefault((row["clip"], row["selector"], row["order"]), [])
        curve.append((row["density"], row["relative_error"]))
    return {key: sorted(curve) for key, curve in curves.items()}


def _heads() -> list[str]:
    return [f"{density:.0%}" for density in DENSITIES]


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


if __name__ == "__main__":
    main()
