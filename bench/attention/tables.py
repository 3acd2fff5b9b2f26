"""Tables and plots of the files of `bench.attention`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import markdown
from ..calls import DENSE_KERNELS
from ..figures import COLORS, DASHES, MARKERS
from ..markdown import milliseconds, percent
from . import gate

# With stage, shape and length, what tells the rows of one benchmark apart.
PARTS = ("density", "selector", "backend")
PLOTTED = "two"

Result = dict[str, Any]
Row = dict[str, Any]


def join(results: Sequence[Result]) -> Result:
    """Files of one benchmark, device and versions as one: what an earlier one has counts.

    Raises:
        ValueError: The files are of different devices or versions.
    """
    first, *others = results
    if not others:
        return first
    rows: dict[tuple[Any, ...], Row] = {}
    for result in results:
        if (result["device"], result["versions"]) != (first["device"], first["versions"]):
            raise ValueError(
                f"files must be of one device and its versions, got {first['device']} with "
                f"{first['versions']} and {result['device']} with {result['versions']}; give each "
                "a section of its own"
            )
        for row in result["rows"]:
            key = (row.get(name) for name in ("stage", "shape", "tokens", *PARTS))
            rows.setdefault(tuple(key), row)
    stopped = {"stopped": ", ".join(r["stopped"] for r in results if "stopped" in r)}
    commands = {"commands": [result["command"] for result in results]}
    gates = {"gate": gate.summarize([row for row in rows.values() if row["stage"] == "gate"])}
    joined = {**first, **commands, **gates, "rows": list(rows.values())}
    return joined | (stopped if stopped["stopped"] else {})


def describe_together(results: Sequence[Result], name: str) -> str:
    """Every table of several files, made one."""
    return describe(join(results), name)


def describe(result: Result, name: str) -> str:
    """Every table of one file, or of several that `join` made one."""
    title = f"{name}: {result['device']}, torch {result['versions'].get('torch')}"
    head = markdown.heading(title, result)
    if not result["gate"].get("passed"):
        head.append("THE GATE DID NOT PASS: no number below may be used.")
    parts = [*head, f"Gate: {json.dumps(result['gate'])}"]
    for shape in _unique(row["shape"] for row in result["rows"]):
        for title, table in tables(result, shape):
            parts += [f"### {shape}: {title}", table]
    return markdown.page(*parts, errors_table(result))


def tables(result: Result, shape: str) -> list[tuple[str, str]]:
    """Titles and Markdown tables of one shape."""
    found = [("dense, ms", dense_table(result, shape))]
    for selector in _unique(row["selector"] for row in sparse_rows(result, shape)):
        found.append((f"{selector}, speed-up over SDPA", speedup_table(result, shape, selector)))
    found.append(("selection", selection_table(result, shape)))
    found.append(("backends", backends_table(result, shape)))
    return [(title, table) for title, table in found if table]


def sparse_rows(result: Result, shape: str, selector: str | None = None) -> list[Row]:
    """Rows of one shape that hold a total, the fastest backend's of each case."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in result["rows"]:
        wanted = selector in (None, row.get("selector"))
        if row.get("stage") != "sparse" or row["shape"] != shape or not wanted:
            continue
        key = (row["selector"], row["tokens"], row["density"])
        total = row.get("total_ms")
        if total and (key not in best or total < best[key]["total_ms"]):
            best[key] = row
    return list(best.values())


def dense_table(result: Result, shape: str) -> str:
    """Milliseconds of every dense kernel by tokens."""
    rows = [r for r in result["rows"] if r.get("stage") == "dense" and r["shape"] == shape]
    rows.sort(key=lambda row: row["tokens"])
    kernels = _unique(name for row in rows for name in row["dense_kernels"])
    return markdown.table(
        {"tokens": "{}", **dict.fromkeys(kernels, milliseconds)},
        [[row["tokens"], *(row["dense_kernels"].get(name) for name in kernels)] for row in rows],
    )


def speedup_table(result: Result, shape: str, selector: str) -> str:
    """Speed-up over default SDPA and, in brackets, over the fastest dense kernel."""
    rows = [row for row in sparse_rows(result, shape, selector) if row.get("speedup")]
    densities = sorted(_unique(row["density"] for row in rows), key=density_order)
    found = {(row["tokens"], row["density"]): row for row in rows}
    lines = [
        [tokens, *(found.get((tokens, density)) for density in densities)]
        for tokens in sorted(_unique(row["tokens"] for row in rows))
    ]
    speedup = "{0[speedup]:.2f}x ({0[speedup_best]:.2f}x)"
    return markdown.table({"tokens": "{}", **{density_name(d): speedup for d in densities}}, lines)


SELECTION: dict[str, markdown.Format] = {
    "tokens": "{}",
    "selector": "{}",
    "density": "{:.1%}",
    **dict.fromkeys(("pool ms", "score ms", "select ms"), milliseconds),
    **dict.fromkeys(("selection ms", "attention ms", "total ms"), milliseconds),
    "share": "{:.0%}",
    "extra MiB": "{:.0f}",
    "backend": "{}",
}


def selection_table(result: Result, shape: str) -> str:
    """Selection, attention and their sum, with selection's share."""
    rows = [row for row in sparse_rows(result, shape) if row.get("selection_ms")]
    rows.sort(key=lambda r: (r["tokens"], density_order(r["density"]), r["selector"]))
    lines = []
    for row in rows:
        stages, extra = row.get("selection_stages_ms") or {}, row.get("extra_memory_bytes")
        line = [row["tokens"], row["selector"], row["density_measured"]]
        line += [stages.get(stage) for stage in ("pool", "score", "select")]
        line += [row[f"{part}_ms"] for part in ("selection", "attention", "total")]
        line += [selection_share(row), None if extra is None else extra / 2**20, row["backend"]]
        lines.append(line)
    return markdown.table(SELECTION, lines)


BACKENDS: dict[str, markdown.Format] = {
    "tokens": "{}",
    "selector": "{}",
    "density": "{}",
    "backend": "{}",
    "of its ideal": "{:.2f}",
    **dict.fromkeys(("total ms", "launched from Python ms", "SDPA ms"), milliseconds),
}


def backends_table(result: Result, shape: str) -> str:
    """Each backend's part of its ideal, density x its dense time, and what a launch adds."""
    lines = []
    for row in result["rows"]:
        dense_ms = row.get("dense_kernels", {}).get(DENSE_KERNELS.get(row.get("backend")))
        if row.get("stage") != "sparse" or row["shape"] != shape or not dense_ms:
            continue
        attention_ms = row.get("attention_ms")
        if not attention_ms:
            continue
        of_its_ideal = row["density_measured"] * dense_ms / attention_ms
        line = [row["tokens"], row["selector"], density_name(row["density"]), row["backend"]]
        times = [row.get(name) for name in ("total_ms", "total_plain_ms", "dense_ms")]
        lines.append([*line, of_its_ideal, *times])
    return markdown.table(BACKENDS, sorted(lines, key=lambda line: line[0]))


def selection_share(row: Row) -> float:
    """Selection over selection and attention."""
    return row["selection_ms"] / (row["selection_ms"] + row["attention_ms"])


def errors_table(result: Result) -> str:
    """What failed or was skipped, and where."""
    places = ("shape", "tokens", "selector", "backend")
    lines = []
    for row in result["rows"]:
        parts = dict(row.get("errors", {}))
        if "skipped" in row:
            parts["skipped"] = row["skipped"]
        where = [row.get(place) for place in places]
        lines += [[*where, part, text.replace("|", "/")] for part, text in parts.items()]
    return markdown.table(dict.fromkeys((*places, "part", "error"), "{}"), lines)


def draw(results: Mapping[str, Result], folder: Path, selector: str | None) -> list[Path]:
    """Plots the speed-up and selection's share against tokens, one file per shape.

    Args:
        results: Files that are plotted as one.
        folder: Where plots go.
        selector: Settings that are plotted, `PLOTTED` by default.
    """
    result, selector = join(list(results.values())), selector or PLOTTED
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for shape in _unique(row["shape"] for row in result["rows"]):
        rows = [row for row in sparse_rows(result, shape, selector) if row.get("speedup")]
        # One length is no line.
        if len(_unique(row["tokens"] for row in rows)) > 1:
            path = folder / f"attention-{shape}.png"
            _draw_shape(rows, f"{shape}, {selector}, {result['device']}", path)
            drawn.append(path)
    return drawn


def _draw_shape(rows: list[Row], title: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.tables: plots need matplotlib, or give --no-plots") from error

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    densities = sorted(_unique(row["density"] for row in rows), key=density_order)
    for place, density in enumerate(densities):
        own = sorted((r for r in rows if r["density"] == density), key=lambda r: r["tokens"])
        style = {
            "color": COLORS[place % len(COLORS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": DASHES[place % len(DASHES)],
            "markersize": 5,
            "label": density_name(density),
        }
        tokens = [row["tokens"] for row in own]
        left.plot(tokens, [row["speedup"] for row in own], **style)
        selected = [row for row in own if row.get("selection_ms")]
        shares = [100 * selection_share(row) for row in selected]
        right.plot([row["tokens"] for row in selected], shares, **style)
    left.axhline(1, color="#777777", linewidth=1)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.set_title("speed-up over dense SDPA", fontsize=10)
    right.set_ylim(0, 100)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    right.set_title("selection's share of the time", fontsize=10)
    ticks = sorted(_unique(row["tokens"] for row in rows))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lines, names = left.get_legend_handles_labels()
    figure.legend(
        lines, names, title="density", loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def density_order(density: float | None) -> float:
    return 2.0 if density is None else density


def density_name(density: float | None) -> str:
    """A density that was asked for; none is the one that a selector's own rule gives."""
    return "own rule" if density is None else percent(density)


def _tokens(count: int) -> str:
    return f"{count // 2**20}M" if count >= 2**20 else f"{count // 1024}k"
