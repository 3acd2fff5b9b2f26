"""Curves and tables from the files of `bench.quality`.

python -m bench.quality_tables [FILE ...] [--plots docs]
python -m bench.quality_tables --page docs/quality.md

Without files, those in bench/results. Tables go to the screen, plots into a folder as PNG; or the
tables of a page are written anew, as `bench.tables` does: those of one file, or a summary of
several.
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from .quality_curves import (
    Point,
    Result,
    Row,
    curve,
    density_at,
    kl_at,
    selectors_of,
    texts_of,
)
from .quality_plots import draw
from .quality_summary import OURS, RIVALS, join, summary_table
from .tables import FOLDER, fill, markdown

# The densities of a rival at which the comparison is made.
DENSITIES = (0.15, 0.2, 0.3, 0.4, 0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="where PNGs go")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--page", type=Path, help="writes the tables of this page, and no plots")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(fill(options.page.read_text(), describe, join))
        return
    files = options.files or sorted(FOLDER.glob("quality-*.json"))
    if not files:
        raise SystemExit(f"bench.quality_tables: no quality-*.json in {FOLDER}")
    for path in files:
        result = json.loads(path.read_text())
        print(describe(result, path.name))
        if texts_of(result) and not options.no_plots:
            plot = options.plots / f"{path.stem}.png"
            draw(result, plot, emphasized=OURS)
            print(f"plotted {plot}\n")


def describe(result: Result, name: str) -> str:
    """Every table of one file, or the summary of several."""
    if "results" in result:
        return summary_table(result["results"]) + "\n"
    judged = f"the last {result['judged']} of them judged"
    if result.get("spread"):
        judged = f"{result['judged']} of them judged, evenly spread"
    head = [
        f"{name}: {result['model']}, {result['tokens']} tokens, {judged}, {result['dtype']}, "
        f"{result['device']}",
        f"`{shlex.join(result['command'])}`",
    ]
    if "stopped" in result:
        head.append(f"Stopped: {result['stopped']}.")
    tables = [("Density that gives the same KL", equal_kl_table(result))]
    tables += [(f"Curves on {text}", curves_table(result, text)) for text in texts_of(result)]
    tables += [("Tasks", tasks_table(result)), ("Settings", settings_table(result))]
    parts = [part for title, table in tables if table for part in (f"### {title}", table)]
    return "\n\n".join([*head, *parts]) + "\n"


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
                cells.append("" if own is None else f"{own / density:.2f} (KL {kl:.4f})")
            if any(cells):
                lines.append([text, rival, *cells])
    head = ["text", "against", *(f"at its density {density:.2f}" for density in DENSITIES)]
    return markdown(head, lines)


def curves_table(result: Result, text: str) -> str:
    """Every point: quality, recall, error, and selection's share of the time by what was timed."""
    varying = varying_settings(result)
    lines = [
        [
            selector,
            f"{point.density:.3f}",
            f"{point.kl:.4f}",
            f"{point.perplexity_ratio:.3f}",
            "" if point.recall is None else f"{point.recall:.4f}",
            "" if point.output_error is None else f"{point.output_error:.3f}",
            _share(point),
            str(point.excerpts),
            f"`{varying[point.parameters]}`",
        ]
        for selector in selectors_of(result)
        for point in curve(result, selector, text)
    ]
    measures = ["density", "KL", "perplexity ratio", "recall", "output error", "selection's share"]
    return markdown(["selector", *measures, "excerpts", "setting"], lines)


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
    lines = [["dense", "", _samples(most), *(f"{score:.3f}" for score in dense), ""]]
    for (selector, parameters), rows in settings.items():
        own, ratios = _scores(rows, "task_scores", names), _scores(rows, "dense_scores", names)
        cells = [_of_dense(score, base) for score, base in zip(own, ratios, strict=True)]
        density = f"{mean(row['density'] for row in rows):.3f}"
        lines.append([selector, density, _samples(rows), *cells, f"`{varying[parameters]}`"])
    head = ["selector", "density", "samples of a task", *names]
    return markdown([*head, "mean", "setting"], lines)


def settings_table(result: Result) -> str:
    """What all points of a selector have in common."""
    lines = []
    for selector, settings in _settings(result).items():
        calls = [_keywords(setting) for setting in settings]
        name, first = calls[0]
        common = [(k, v) for k, v in first.items() if all(c.get(k) == v for _, c in calls)]
        if first:
            lines.append([selector, f"`{name}({', '.join(f'{k}={v}' for k, v in common)})`"])
    return markdown(["selector", "of all its points"], lines) if lines else ""


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
    """The name and the keyword arguments of a selector's ``repr``; none of anything else."""
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


def _samples(rows: Sequence[Row]) -> str:
    return str(sum(row["samples"] for row in rows))


def _of_dense(score: float, dense: float) -> str:
    return f"{score:.3f} ({score / dense:.2f})" if dense else f"{score:.3f}"


def _share(point: Point) -> str:
    if point.selection_share is None:
        return ""
    return f"{100 * point.selection_share:.0f}% ({point.selection_by})"


if __name__ == "__main__":
    main()
