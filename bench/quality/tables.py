"""The tables and the plot of a file of `bench.quality`."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from unisparse_flex.passes.calls import decode_selector

from .. import markdown
from . import plots
from .curves import (
    Point,
    Result,
    Row,
    curve,
    density_at,
    kl_at,
    selectors_of,
    texts_of,
)
from .summary import OURS, RIVALS

# The densities of a rival at which the comparison is made.
DENSITIES = (0.15, 0.2, 0.3, 0.4, 0.5)
CURVES = {
    "selector": "{}",
    "density": "{:.3f}",
    "KL": "{:.4f}",
    "perplexity ratio": "{:.3f}",
    "recall": "{:.4f}",
    "output error": "{:.3f}",
    "selection's share": "{}",
    "excerpts": "{}",
    "setting": "`{}`",
}


def draw(results: Mapping[str, Result], folder: Path, selector: str | None) -> list[Path]:
    """Plots the curves of each file, one picture a file that holds any.

    Args:
        results: Files by their names.
        folder: Where plots go.
        selector: Whose line is thick, `OURS` by default.
    """
    drawn = []
    for name, result in results.items():
        if texts_of(result):
            path = folder / f"{Path(name).stem}.png"
            plots.draw(result, path, emphasized=selector or OURS)
            drawn.append(path)
    return drawn


def describe(result: Result, name: str) -> str:
    """Every table of one file."""
    judged = f"the last {result['judged']} of them judged"
    if result.get("spread"):
        judged = f"{result['judged']} of them judged, evenly spread"
    head = markdown.heading(
        f"{name}: {result['model']}, {result['tokens']} tokens, {judged}, {result['dtype']}, "
        f"{result['device']}",
        result,
    )
    tables = [("Density that gives the same KL", equal_kl_table(result))]
    tables += [(f"Curves on {text}", curves_table(result, text)) for text in texts_of(result)]
    tables += [("Tasks", tasks_table(result)), ("Settings", settings_table(result))]
    parts = [part for title, table in tables if table for part in (f"### {title}", table)]
    return markdown.page(*head, *parts)


def equal_kl_table(result: Result) -> str:
    """Our density over a rival's, or a trial's, at the KL that it has at some densities."""
    trials = [name for name in selectors_of(result) if name.startswith("trial-")]
    lines = []
    for text in texts_of(result):
        ours = curve(result, OURS, text)
        for rival in (*RIVALS, *trials):
            points = curve(result, rival, text)
            cells = []
            for density in DENSITIES:
                kl = kl_at(points, density)
                own = None if kl is None else density_at(ours, kl)
                cells.append(None if own is None else (own / density, kl))
            if any(cells):
                lines.append([text, rival, *cells])
    heads = [f"at its density {density:.2f}" for density in DENSITIES]
    compared = dict.fromkeys(heads, "{0[0]:.2f} (KL {0[1]:.4f})")
    return markdown.table({"text": "{}", "against": "{}", **compared}, lines)


def curves_table(result: Result, text: str) -> str:
    """Every point: quality, recall, error, and selection's share of the time by what was timed."""
    varying = varying_settings(result)
    lines = [
        [
            selector,
            point.density,
            point.kl,
            point.perplexity_ratio,
            point.recall,
            point.output_error,
            _share(point),
            point.excerpts,
            varying[point.parameters],
        ]
        for selector in selectors_of(result)
        for point in curve(result, selector, text)
    ]
    return markdown.table(CURVES, lines)


def tasks_table(result: Result) -> str:
    """Scores of every task and their mean, and in brackets what they are of the dense model's."""
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        if "task_scores" in row:
            settings.setdefault((row["selector"], row["parameters"]), []).append(row)
    if not settings:
        return ""
    every = [row for rows in settings.values() for row in rows]
    varying = varying_settings(result)
    names = list(dict.fromkeys(name for row in every for name in row["task_scores"]))
    # The same samples for every selector; a file that was stopped may hold fewer for the last.
    most = max(settings.values(), key=len)
    dense = _scores(most, "dense_scores", names)
    lines: list[list[Any]] = [
        ["dense", None, _samples(most), *(f"{score:.3f}" for score in dense), None]
    ]
    for (selector, parameters), rows in settings.items():
        own, ratios = _scores(rows, "task_scores", names), _scores(rows, "dense_scores", names)
        cells = [_of_dense(score, base) for score, base in zip(own, ratios, strict=True)]
        density = mean(row["density"] for row in rows)
        lines.append([selector, density, _samples(rows), *cells, varying[parameters]])
    columns = {"selector": "{}", "density": "{:.3f}", "samples of a task": "{}"}
    columns |= dict.fromkeys((*names, "mean"), "{}")
    return markdown.table(columns | {"setting": "`{}`"}, lines)


def settings_table(result: Result) -> str:
    """What all points of a selector have in common."""
    lines = []
    for selector, settings in _settings(result).items():
        calls = [_keywords(setting) for setting in settings]
        name, first = calls[0]
        common = [(k, v) for k, v in first.items() if all(c.get(k) == v for _, c in calls)]
        if first:
            lines.append([selector, f"{name}({', '.join(f'{k}={v}' for k, v in common)})"])
    return markdown.table({"selector": "{}", "of all its points": "`{}`"}, lines)


def varying_settings(result: Result) -> dict[str, str]:
    """For every setting of a file, what tells it from the others of its selector."""
    short: dict[str, str] = {}
    for settings in _settings(result).values():
        calls = [_keywords(setting)[1] for setting in settings]
        for setting, own in zip(settings, calls, strict=True):
            parts = [f"{k}={v}" for k, v in own.items() if any(c.get(k) != v for c in calls)]
            short[setting] = ", ".join(parts) or setting
    return short


def _settings(result: Result) -> dict[str, list[str]]:
    """The settings of every selector that was measured."""
    found: dict[str, dict[str, None]] = {}
    for row in result["rows"]:
        if "kl" in row or "task_scores" in row:
            found.setdefault(row["selector"], {})[row["parameters"]] = None
    return {selector: list(settings) for selector, settings in found.items()}


def _keywords(setting: str) -> tuple[str, dict[str, str]]:
    """The name and all arguments of a selector's ``repr``; of a trial's, those that it states."""
    try:
        selector = decode_selector(setting)
    except ValueError:
        return _stated_keywords(setting)
    values = {field.name: repr(getattr(selector, field.name)) for field in fields(selector)}
    return type(selector).__name__, values


def _stated_keywords(setting: str) -> tuple[str, dict[str, str]]:
    """The name and the keyword arguments of a call; none of anything else."""
    try:
        call = ast.parse(setting, mode="eval").body
    except SyntaxError:
        return setting, {}
    if not isinstance(call, ast.Call):
        return setting, {}
    return ast.unparse(call.func), {str(k.arg): ast.unparse(k.value) for k in call.keywords}


def _scores(rows: Sequence[Row], kind: str, names: Sequence[str]) -> list[float]:
    """The mean over rows of every task, and after them the mean over tasks."""
    scores = [mean(row[kind][name] for row in rows) for name in names]
    return [*scores, mean(scores)]


def _samples(rows: Sequence[Row]) -> int:
    return sum(row["samples"] for row in rows)


def _of_dense(score: float, dense: float) -> str:
    return f"{score:.3f} ({score / dense:.2f})" if dense else f"{score:.3f}"


def _share(point: Point) -> str | None:
    if point.selection_share is None:
        return None
    return f"{100 * point.selection_share:.0f}% ({point.selection_by})"
