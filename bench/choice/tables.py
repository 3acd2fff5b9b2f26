"""The tables of one file of `bench.choice`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import markdown
from .choices import Choice
from .curves import DEFAULT, PARTS, Point, choices_of, curve, default_kl, reach, seconds, shapes_of
from .curves import texts_of as texts_of
from .seconds import Clock, key_reads, operations

NAMES = {1.0: "the default's KL", 0.25: "a quarter of it"}


def describe(result: Mapping[str, Any], name: str) -> str:
    """Density and time at equal KL of every choice, by the time, then the points."""
    title = (
        f"{name}: {result['model']}, {result['tokens']} tokens, {', '.join(texts_of(result))}, "
        f"KL of the last {result['judged']} tokens, {result['device']}"
    )
    parts = [_ratios(result), "Points: threshold, density, KL.", _points(result)]
    return markdown.page(*markdown.heading(title, result), *parts)


def _ratios(result: Mapping[str, Any]) -> str:
    kl = default_kl(result)
    if kl is None:
        return ""
    default = curve(result, DEFAULT)
    plain = Choice.parse(DEFAULT)
    shapes = shapes_of(result)
    clocks = [Clock.of(shape) for shape in shapes]
    columns: dict[str, markdown.Format] = {
        "choice": "`{}`",
        "rows": "{:.3g}",
        "operations": markdown.percent,
        "keys read": "{:.0f}",
    }
    for part in PARTS:
        columns[f"density, {NAMES[part]}"] = "{:.3f}"
        columns[f"over the default's, {NAMES[part]}"] = "{:.2f}"
        columns |= {f"time over, {shape}, {NAMES[part]}": "{:.2f}" for shape in shapes}
    lines = []
    for choice_name in choices_of(result):
        choice, points = Choice.parse(choice_name), curve(result, choice_name)
        if not points:
            continue
        rows = max(point.score_rows for point in points)
        line: list[Any] = [choice_name, rows, operations(choice, rows), key_reads(choice)]
        for part in PARTS:
            found, own = reach(points, part * kl), reach(default, part * kl)
            if found is None or own is None:
                line += [None] * (2 + len(clocks))
                continue
            line += [found.density, found.density / own.density]
            for clock in clocks:
                line.append(seconds(choice, found, clock) / seconds(plain, own, clock))
        lines.append(line)
    return markdown.table(columns, lines)


def _points(result: Mapping[str, Any]) -> str:
    names = choices_of(result)
    thresholds = sorted({row["threshold"] for row in result["rows"]})
    columns: dict[str, markdown.Format] = {"choice": "`{}`"}
    columns |= {f"{threshold:g}": _point for threshold in thresholds}
    lines = []
    for name in names:
        by_threshold = {point.threshold: point for point in curve(result, name)}
        lines.append([name, *(by_threshold.get(threshold) for threshold in thresholds)])
    return markdown.table(columns, lines)


def _point(point: Point) -> str:
    return f"{point.density:.3f}, {point.kl:.4f}"
