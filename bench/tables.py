"""Markdown tables and plots from the files of this benchmark, but for those of its quality.

python -m bench.tables [FILE ...] [--join] [--plots docs] [--selector two]
python -m bench.tables --page docs/performance.md

Without files, those in bench/results. Tables go to the screen, plots into a folder as PNG; or the
tables of a page are written anew, each between a comment that names its files and the next comment.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import gate
from .contenders import DENSE_KERNELS

FOLDER = Path("bench/results")
SECTION = r"(?P<start><!-- tables of (?P<names>[\w. -]+?) -->)(?:(?!<!--).)*(?P<end><!-- end -->)"
KINDS = ("attention", "cost-decision", "prefill")
# With stage, shape and length, what tells the rows of one benchmark apart.
PARTS = ("density", "selector", "backend")
# Okabe and Ito's colours, apart for colour-blind eyes; markers and dashes tell the same.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

Result = dict[str, Any]
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--join", action="store_true", help="all files as one")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="where PNGs go")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--selector", default="two", help="settings that are plotted")
    parser.add_argument("--page", type=Path, help="writes the tables of this page, and no plots")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(fill(options.page.read_text(), describe))
        return
    files = options.files or sorted(path for kind in KINDS for path in FOLDER.glob(f"{kind}-*"))
    if not files:
        raise SystemExit(f"bench.tables: no files of {', '.join(KINDS)} in {FOLDER}")
    results = [(path.name, json.loads(path.read_text())) for path in files]
    if options.join:
        names = ", ".join(name for name, _ in results)
        results = [(names, join([result for _, result in results]))]
    for name, result in results:
        print(describe(result, name))
        if any(row.get("stage") == "sparse" for row in result["rows"]) and not options.no_plots:
            for plot in draw(result, options.plots, options.selector):
                print(f"plotted {plot}\n")


def fill(
    page: str,
    describe: Callable[[Result, str], str],
    combine: Callable[[Sequence[Result]], Any] | None = None,
) -> str:
    """The page with what ``describe`` says of the named files of `FOLDER` written anew.

    Several files of one section are made one by ``combine``, `join` by default.
    """

    def tables_of(match: re.Match[str]) -> str:
        names = match["names"].split()
        results = [json.loads((FOLDER / name).read_text()) for name in names]
        text = describe((combine or join)(results), ", ".join(names))
        return f"{match['start']}\n\n{text}\n{match['end']}"

    return re.sub(SECTION, tables_of, page, flags=re.DOTALL)


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


def describe(result: Result, name: str) -> str:
    """Every table of one file, or of several that `join` made one."""
    is_prefill = any("variant" in row for row in result["rows"])
    is_decision = any("decision" in row for row in result["rows"])
    head = [f"{name}: {result['device']}, torch {result['versions'].get('torch')}"]
    head += [f"`{shlex.join(command)}`" for command in commands_of(result)]
    if "stopped" in result:
        head.append(f"Stopped: {result['stopped']}.")
    if is_prefill:
        model = result["model"]
        head.append(f"{model['layers']} layers of width {model['hidden_size']}.")
        return "\n\n".join([*head, prefill_table(result)]) + "\n"
    if is_decision:
        return "\n\n".join([*head, decision_table(result)]) + "\n"
    if not result["gate"].get("passed"):
        head.append("THE GATE DID NOT PASS: no number below may be used.")
    parts = [*head, f"Gate: {json.dumps(result['gate'])}"]
    for shape in _unique(row["shape"] for row in result["rows"]):
        for title, table in tables(result, shape):
            parts += [f"### {shape}: {title}", table]
    return "\n\n".join([*parts, errors_table(result)]).rstrip() + "\n"


def commands_of(result: Result) -> list[list[str]]:
    """What was run for the rows of a result."""
    return result.get("commands") or [result["command"]]


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
    return markdown(
        ["tokens", *kernels],
        [[str(r["tokens"]), *(_number(r["dense_kernels"].get(k)) for k in kernels)] for r in rows],
    )


def speedup_table(result: Result, shape: str, selector: str) -> str:
    """Speed-up over default SDPA and, in brackets, over the fastest dense kernel."""
    rows = [row for row in sparse_rows(result, shape, selector) if row.get("speedup")]
    densities = sorted(_unique(row["density"] for row in rows), key=density_order)
    lines = []
    for tokens in sorted(_unique(row["tokens"] for row in rows)):
        own = {row["density"]: row for row in rows if row["tokens"] == tokens}
        lines.append([str(tokens), *(_speedup(own.get(density)) for density in densities)])
    return markdown(["tokens", *(percent(density) for density in densities)], lines)


def selection_table(result: Result, shape: str) -> str:
    """Selection, attention and their sum, with selection's share."""
    rows = [row for row in sparse_rows(result, shape) if row.get("selection_ms")]
    rows.sort(key=lambda r: (r["tokens"], density_order(r["density"]), r["selector"]))
    lines = []
    for row in rows:
        stages = row.get("selection_stages_ms") or {}
        line = [str(row["tokens"]), row["selector"], f"{100 * row['density_measured']:.1f}%"]
        line += [_number(stages.get(stage)) for stage in ("pool", "score", "select")]
        line += [_number(row[f"{part}_ms"]) for part in ("selection", "attention", "total")]
        extra = row.get("extra_memory_bytes")
        line += [f"{100 * selection_share(row):.0f}%"]
        line += ["" if extra is None else f"{extra / 2**20:.0f}", row["backend"]]
        lines.append(line)
    stages = ["pool ms", "score ms", "select ms", "selection ms", "attention ms", "total ms"]
    head = ["tokens", "selector", "density", *stages, "share", "extra MiB", "backend"]
    return markdown(head, lines)


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
        ideal_ms = row["density_measured"] * dense_ms
        lines.append(
            [
                str(row["tokens"]),
                row["selector"],
                percent(row["density"]),
                row["backend"],
                f"{ideal_ms / attention_ms:.2f}",
                _number(row.get("total_ms")),
                _number(row.get("total_plain_ms")),
                _number(row.get("dense_ms")),
            ]
        )
    lines.sort(key=lambda line: int(line[0]))
    head = ["tokens", "selector", "density", "backend", "of its ideal"]
    return markdown([*head, "total ms", "launched from Python ms", "SDPA ms"], lines)


def selection_share(row: Row) -> float:
    """Selection over selection and attention."""
    return row["selection_ms"] / (row["selection_ms"] + row["attention_ms"])


def prefill_table(result: Result) -> str:
    """Milliseconds to the first token, and the speed-up over the faster dense run."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: row["tokens"]):
        memory = row.get("peak_bytes")
        lines.append(
            [
                str(row["tokens"]),
                row["variant"],
                percent(row["density_expected"]) if "density_expected" in row else "",
                _number(row.get("ms")),
                f"{row['speedup']:.2f}x" if "speedup" in row else "",
                "" if memory is None else f"{memory / 2**30:.1f}",
            ]
        )
    return markdown(["tokens", "variant", "density", "ms", "speed-up", "peak GiB"], lines)


def decision_table(result: Result) -> str:
    """How the cost model decides each call, and its time over that of the call left alone."""
    lines = [
        [
            str(row["layers"] or "bare call"),
            str(row["tokens"]),
            str(row["queries"]),
            _rule(row["selector"]),
            row.get("decision", ""),
            "" if row.get("density") is None else percent(row["density"]),
            _number(row.get("dense_ms")),
            _number(row.get("optimized_ms")),
            f"{row['ratio']:.2f}" if "ratio" in row else "",
        ]
        for row in result["rows"]
    ]
    head = ["layers", "tokens", "queries", "rule", "decision", "density"]
    return markdown([*head, "left alone ms", "optimized ms", "ratio"], lines)


def _rule(selector: str) -> str:
    """The rule in a selector's text."""
    return ", ".join(re.findall(r"(?:top_p|top_k|threshold)=[\d.]+", selector))


def errors_table(result: Result) -> str:
    """What failed or was skipped, and where."""
    lines = []
    for row in result["rows"]:
        parts = dict(row.get("errors", {}))
        if "skipped" in row:
            parts["skipped"] = row["skipped"]
        where = [str(row.get(k, "")) for k in ("shape", "tokens", "selector", "backend")]
        lines += [[*where, part, text.replace("|", "/")] for part, text in parts.items()]
    return markdown(["shape", "tokens", "selector", "backend", "part", "error"], lines)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Of points (x, y) by rising x, y at an ``x``: its logarithm is straight between two.

    ``None`` outside of them, and beside a y without a logarithm.
    """
    for (low, first), (high, last) in pairwise(points):
        if low <= x <= high and min(first, last) > 0:
            part = 0.0 if low == high else (x - low) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(last))
    return None


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; empty without lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(result: Result, folder: Path, selector: str) -> list[Path]:
    """Plots the speed-up and selection's share against tokens, one file per shape."""
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
            "label": percent(density),
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


def percent(density: float | None) -> str:
    return "own top_p" if density is None else f"{100 * density:.3g}%"


def _tokens(count: int) -> str:
    return f"{count // 2**20}M" if count >= 2**20 else f"{count // 1024}k"


def _number(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _speedup(row: Row | None) -> str:
    return "" if row is None else f"{row['speedup']:.2f}x ({row['speedup_best']:.2f}x)"


if __name__ == "__main__":
    main()
