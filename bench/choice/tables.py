"""The tables of one file of `bench.choice`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from .. import markdown
from .choices import Choice
from .curves import (
    DEFAULT,
    DEFAULT_THRESHOLD,
    PARTS,
    Point,
    choices_of,
    curve,
    default_kl,
    density_ratios,
    excerpts_of,
    reach,
    seconds,
    shapes_of,
)
from .parts import Tile
from .seconds import Clock, key_reads, operations

NAMES = {1.0: "KL", 0.5: "KL / 2", 0.25: "KL / 4"}
# True masses in natural order.
TRUE = "none/r128"
# Excerpts of which nothing can be said one by one.
FEW = 3


def describe(result: Mapping[str, Any], name: str) -> str:
    """Density and time at equal KL of every choice, then the points; or block sizes."""
    if result.get("part") == "tiles":
        return _describe_tiles(result, name)
    if result.get("part") == "tasks":
        return _describe_tasks(result, name)
    if result.get("part") == "rounding":
        return _describe_rounding(result, name)
    texts = Counter(text for text, _ in excerpts_of(result))
    excerpts = ", ".join(f"{count} of {text}" for text, count in texts.items())
    title = (
        f"{name}: {result['model']}, {result['tokens']} tokens, excerpts: {excerpts}; KL of the "
        f"last {result['judged']} tokens, {result['device']}"
    )
    kl = default_kl(result)
    shapes = "; ".join(f"{chr(ord('a') + place)}: {s}" for place, s in enumerate(shapes_of(result)))
    note = f"Times: {shapes}." if kl is None else f"The default's KL: {kl:.4f}. Times: {shapes}."
    parts = [note, _ratios(result)]
    if len(excerpts_of(result)) > FEW:
        parts += ["Density over the default's, excerpt by excerpt.", _spread(result)]
        if over := _over_true(result):
            parts += [f"Density over that of `{TRUE}` at its KL, by its threshold.", over]
    parts += ["Density and KL by threshold.", _points(result)]
    if len(excerpts_of(result)) > FEW:
        parts += ["Perplexity ratio by threshold: mean, least and most.", _perplexities(result)]
    if layers := _layers(result):
        parts += ["Density by layer, threshold 0.006.", layers]
    return markdown.page(*markdown.heading(title, result), *parts)


def _ratios(result: Mapping[str, Any]) -> str:
    """Every choice over the default at equal KL, by the density at the default's."""
    kl = default_kl(result)
    if kl is None:
        return ""
    default, plain = curve(result, DEFAULT), Choice.parse(DEFAULT)
    clocks = [Clock.of(shape) for shape in shapes_of(result)]
    columns: dict[str, markdown.Format] = {
        "choice": "`{}`",
        "rows": "{:.3g}",
        "operations": markdown.percent,
        "keys read": "{:.0f}",
    }
    for part in PARTS:
        columns[f"density, {NAMES[part]}"] = "{:.2f}"
        columns |= {
            f"time {chr(ord('a') + place)}, {NAMES[part]}": "{:.2f}" for place in range(len(clocks))
        }
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
                line += [None] * (1 + len(clocks))
                continue
            line.append(found.density / own.density)
            for clock in clocks:
                ratio = seconds(choice, found, clock) / seconds(plain, own, clock)
                line.append(None if math.isnan(ratio) else ratio)
        if any(value is not None for value in line[4:]):
            lines.append(line)
    lines.sort(key=lambda line: next(value for value in line[4:] if value is not None))
    return markdown.table(columns, lines)


def _spread(result: Mapping[str, Any]) -> str:
    """How the excerpts differ: the mean ratio with its standard error, the least and the most."""
    columns: dict[str, markdown.Format] = {"choice": "`{}`"}
    for part in PARTS:
        columns |= {f"{NAMES[part]}: mean": "{}", f"{NAMES[part]}: from, to": "{}"}
        columns[f"{NAMES[part]}: excerpts"] = "{}"
    lines = []
    for choice in choices_of(result):
        line: list[Any] = [choice]
        for part in PARTS:
            found = density_ratios(result, choice, part) if choice != DEFAULT else []
            if len(found) < 2:
                line += [None] * 3
                continue
            error = stdev(found) / math.sqrt(len(found))
            line += [f"{mean(found):.3f} ± {error:.3f}"]
            line += [f"{min(found):.2f}, {max(found):.2f}", len(found)]
        if any(line[1:]):
            lines.append(line)
    return markdown.table(columns, lines)


def _over_true(result: Mapping[str, Any]) -> str:
    points = curve(result, TRUE)
    columns: dict[str, markdown.Format] = {"choice": "`{}`"}
    columns |= {f"{point.threshold:g}": "{:.2f}" for point in points}
    lines = []
    for choice in choices_of(result):
        found = [reach(curve(result, choice), point.kl) for point in points]
        ratios = [f and f.density / p.density for f, p in zip(found, points, strict=True)]
        if any(ratios):
            lines.append([choice, *ratios])
    return markdown.table(columns, lines) if points else ""


def _perplexities(result: Mapping[str, Any]) -> str:
    thresholds = sorted({row["threshold"] for row in result["rows"]})
    found: dict[tuple[str, float], list[float]] = {}
    for row in result["rows"]:
        if "perplexity_ratio" in row:
            found.setdefault((row["choice"], row["threshold"]), []).append(row["perplexity_ratio"])
    count = len(excerpts_of(result))
    texts = {
        key: f"{mean(some):.4f} ({min(some):.3f}, {max(some):.3f})"
        for key, some in found.items()
        if len(some) == count
    }
    columns: dict[str, markdown.Format] = {"choice": "`{}`"}
    columns |= {f"{threshold:g}": "{}" for threshold in thresholds}
    return markdown.table(
        columns, [[c, *(texts.get((c, t)) for t in thresholds)] for c in choices_of(result)]
    )


def _describe_tasks(result: Mapping[str, Any], name: str) -> str:
    """Mean scores, and how they differ from the dense ones of the same samples."""
    title = (
        f"{name}: {result['model']}, prompts of {result['tokens']} tokens, answers of at most "
        f"{result['answer']}, {result['device']}"
    )
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    scores: dict[tuple[str, float | None], dict[str, list[float]]] = {}
    densities: dict[tuple[str, float | None], list[float]] = {}
    for row in result["rows"]:
        setting = row["choice"], row["threshold"]
        scores.setdefault(setting, {}).setdefault(row["task"], []).extend(row["scores"])
        densities.setdefault(setting, []).append(row["density"])
    [dense] = [found for (choice, _), found in scores.items() if choice == "dense"]
    columns: dict[str, markdown.Format] = {
        "choice": "`{}`",
        "threshold": "{:g}",
        "density": "{:.3f}",
        **dict.fromkeys(tasks, "{:.3f}"),
        "all": "{:.3f}",
        "over dense": "{}",
        "samples": "{}",
    }
    lines = []
    for (choice, threshold), found in scores.items():
        pairs = [p for t in tasks for p in zip(found[t], dense[t], strict=True)]
        apart = [own - usual for own, usual in pairs]
        error = stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        lines.append(
            [
                choice,
                threshold,
                mean(densities[choice, threshold]),
                *(mean(found[task]) for task in tasks),
                mean(own for own, _ in pairs),
                f"{mean(apart):+.3f} ± {error:.3f}" if choice != "dense" else None,
                len(pairs),
            ]
        )
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


def _describe_rounding(result: Mapping[str, Any], name: str) -> str:
    title = (
        f"{name}: {result['model']} in bfloat16, {result['tokens']} tokens, attention in float32 "
        f"instead of bfloat16; KL of the last {result['judged']} tokens, {result['device']}"
    )
    columns: dict[str, markdown.Format] = {
        "text": "{}",
        "excerpt": "{}",
        "KL": "{:.4f}",
        "perplexity ratio": "{:.4f}",
    }
    fields = ("text", "seed", "kl", "perplexity_ratio")
    lines = [[row[field] for field in fields] for row in result["rows"]]
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


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


def _describe_tiles(result: Mapping[str, Any], name: str) -> str:
    title = f"{name}: {result['device']}, torch {result['versions']['torch']}"
    columns: dict[str, markdown.Format] = {
        "heads, key heads, dim": "{}",
        "tokens": "{}",
        "what": "{}",
        "rows x keys": "{}",
        "kernel's tile": "{}",
        "kept": markdown.percent,
        "ms": markdown.milliseconds,
        "for as much, over 128 x 128": "{:.2f}",
    }
    usual = {_key(row): _rate(row) for row in result["rows"] if row["tile"] == str(Tile())}
    lines = []
    for row in result["rows"]:
        kernel, rate, base = row.get("kernel"), _rate(row), usual.get(_key(row))
        lines.append(
            [
                " / ".join(str(row[name]) for name in ("q_heads", "kv_heads", "head_dim")),
                row["length"],
                row["stage"],
                row["tile"],
                f"{kernel['BLOCK_M']} x {kernel['BLOCK_N']}" if kernel else None,
                row.get("density"),
                row["p20"] * 1e3 if "p20" in row else None,
                rate / base if rate and base else None,
            ]
        )
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("stage", "q_heads", "kv_heads", "head_dim", "length")
    # Kept blocks are drawn: about as many.
    return (*(row[name] for name in names), round(row.get("density", 0) / 0.08))


def _rate(row: Mapping[str, Any]) -> float | None:
    return row["p20"] / row.get("density", 1.0) if "p20" in row else None


def _layers(result: Mapping[str, Any]) -> str:
    """Of the choices for which the file holds it, mean over the excerpts."""
    found: dict[str, list[list[float]]] = {}
    for row in result["rows"]:
        if row.get("densities") and row["threshold"] == DEFAULT_THRESHOLD:
            found.setdefault(row["choice"], []).append(row["densities"])
    means = [[mean(layer) for layer in zip(*rows, strict=True)] for rows in found.values()]
    columns: dict[str, markdown.Format] = {"layer that chooses": "{}"}
    columns |= {f"`{name}`": "{:.2f}" for name in found}
    return markdown.table(
        columns, [(i, *layer) for i, layer in enumerate(zip(*means, strict=True))]
    )


def _point(point: Point) -> str:
    return f"{point.density:.3f}, {point.kl:.4f}"
