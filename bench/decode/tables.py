"""The tables of a file of `bench.decode`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from .. import markdown

Result = dict[str, Any]
Row = dict[str, Any]
# What the library's summary is held against: Quest's, of units of so many keys.
OURS, RIVAL, BOUND = "unisparse", "quest", "oracle"
SETTING: dict[str, markdown.Format] = {
    "summary": "{}",
    "unit": "{}",
    "memory": markdown.percent,
}


def describe(result: Result, name: str) -> str:
    """Every table of one file."""
    head = markdown.heading(
        f"{name}: {result['model']}, {result['tokens'] - result['decoded']} tokens and "
        f"{result['decoded']} decoded after them, {result['group']} query heads of a key head, "
        f"{result['dtype']}, {result['device']}",
        result,
    )
    tables = []
    for prefill in kinds_of(result):
        after = f"after {prefill} prefill"
        tables += [
            (f"KL {after}", kl_table(result, prefill)),
            (f"KL over Quest's {after}", ratio_table(result, prefill)),
            (f"KL by top-p {after}", top_p_table(result, prefill)),
            (f"KL by text {after}", text_table(result, prefill)),
        ]
    tables.append(("Answers kept", tasks_table(result)))
    parts = [part for title, table in tables if table for part in (f"### {title}", table)]
    return markdown.page(*head, *parts)


def describe_together(results: Sequence[Result], name: str) -> str:
    """The tables of several files of one model, as of one."""
    joined = results[0] | {
        "commands": [result["command"] for result in results],
        "rows": [row for result in results for row in result["rows"]],
    }
    return describe(joined, name)


def kinds_of(result: Result) -> list[str]:
    """Kinds of prefill."""
    return list(dict.fromkeys(row["prefill"] for row in result["rows"] if "prefill" in row))


def texts_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in result["rows"] if "text" in row))


def rows_at(result: Result, measure: str = "kl", /, **wanted: Any) -> list[Row]:
    """The rows with this measure that say this of themselves."""
    return [
        row
        for row in result["rows"]
        if measure in row and all(row.get(name) == value for name, value in wanted.items())
    ]


def kl_at(result: Result, /, **wanted: Any) -> float | None:
    """The mean KL of these rows."""
    rows = rows_at(result, **wanted)
    return mean(row["kl"] for row in rows) if rows else None


def settings_of(rows: Sequence[Row]) -> list[tuple[str, int | None, float | None]]:
    """Summary, unit and memory, each once."""
    return list(dict.fromkeys((r["summary"], r.get("unit"), r.get("memory")) for r in rows))


def kl_table(result: Result, prefill: str) -> str:
    """KL by summary, unit and share, and the share of the likeliest tokens that are dense's."""
    rows = rows_at(result, prefill=prefill)
    shares = sorted({row["share"] for row in rows if row.get("share")})
    lines: list[list[Any]] = []
    if prefill != "dense" and shares:
        found = _judged(rows_at(result, prefill=prefill, summary="dense"))
        lines.append(["dense", None, None, *[found for _ in shares]])
    for summary, unit, memory in settings_of([row for row in rows if row.get("share")]):
        cells = [
            _judged(rows_at(result, prefill=prefill, summary=summary, unit=unit, share=share))
            for share in shares
        ]
        lines.append([summary, unit, memory or None, *cells])
    columns: dict[str, markdown.Format] = {f"{share:.0%} of the keys": _cell for share in shares}
    return markdown.table(SETTING | columns, lines)


def ratio_table(result: Result, prefill: str, share: float = 0.1) -> str:
    """KL at a share over that of Quest's summary of several units."""
    at: dict[str, Any] = {"prefill": prefill, "share": share}
    units = sorted({row["unit"] for row in rows_at(result, summary=RIVAL, **at)})
    rivals = [kl_at(result, summary=RIVAL, unit=unit, **at) for unit in units]
    lines = []
    for summary, unit, memory in settings_of(rows_at(result, **at)):
        own = kl_at(result, summary=summary, unit=unit, **at)
        if own is not None and summary != RIVAL:
            ratios = [None if not rival else own / rival for rival in rivals]
            lines.append([summary, unit, memory or None, own, *ratios])
    columns: dict[str, markdown.Format] = {f"KL at {share:.0%}": "{:.4f}"}
    columns |= {f"over Quest's of {unit}": "{:.2f}" for unit in units}
    return markdown.table(SETTING | columns, lines)


def top_p_table(result: Result, prefill: str) -> str:
    """Keys kept and KL by top-p."""
    rows = [row for row in rows_at(result, prefill=prefill) if row.get("top_p")]
    top_ps = sorted({row["top_p"] for row in rows})
    lines = [
        [
            summary,
            unit,
            memory or None,
            *[_kept(rows_at(result, prefill=prefill, summary=summary, top_p=p)) for p in top_ps],
        ]
        for summary, unit, memory in settings_of(rows)
    ]
    columns: dict[str, markdown.Format] = {f"top-p {p:g}": "{}" for p in top_ps}
    return markdown.table(SETTING | columns, lines)


def text_table(result: Result, prefill: str, share: float = 0.1) -> str:
    """KL at a share by text."""
    at: dict[str, Any] = {"prefill": prefill, "share": share}
    texts = texts_of(result)
    lines = []
    for summary, unit, memory in settings_of(rows_at(result, **at)):
        cells = [kl_at(result, summary=summary, unit=unit, text=text, **at) for text in texts]
        lines.append([summary, unit, memory or None, *cells])
    columns: dict[str, markdown.Format] = dict.fromkeys(texts, "{:.4f}")
    return markdown.table(SETTING | columns, lines)


def tasks_table(result: Result) -> str:
    """The share of what dense decoding answers after the same prefill that is still answered."""
    rows = [row for row in rows_at(result, "answers_kept") if row["summary"] != "dense"]
    places = list(dict.fromkeys((row["task"], row["prefill"]) for row in rows))
    solved = {(row["task"], row["prefill"]): (row["solved"], row["drawn"]) for row in rows}
    settings = dict.fromkeys(
        (r["summary"], r["unit"], r["memory"] or None, r["share"], r["top_p"]) for r in rows
    )
    lines = []
    for setting in settings:
        summary, unit, _, share, top_p = setting
        wanted = {"summary": summary, "unit": unit, "share": share, "top_p": top_p}
        found = [
            rows_at(result, "answers_kept", task=task, prefill=kind, **wanted)
            for task, kind in places
        ]
        kept = mean(row["kept"] for group in found for row in group)
        cells = [mean(row["answers_kept"] for row in group) if group else None for group in found]
        lines.append([*setting, kept, *cells])
    columns: dict[str, markdown.Format] = {
        "share": "{:.0%}",
        "top-p": "{:g}",
        "keys kept": "{:.1%}",
    }
    heads = [
        f"{task}, {kind} prefill: {solved[task, kind][0]} of {solved[task, kind][1]} solved"
        for task, kind in places
    ]
    columns |= dict.fromkeys(heads, "{:.0%}")
    return markdown.table(SETTING | columns, lines)


def _judged(rows: Sequence[Row]) -> tuple[float, float] | None:
    """Mean KL, and the share of equal likeliest tokens."""
    if not rows:
        return None
    return mean(row["kl"] for row in rows), mean(row["same_token"] for row in rows)


def _cell(found: tuple[float, float]) -> str:
    return f"{found[0]:.4f} ({found[1]:.1%})"


def _kept(rows: Sequence[Row]) -> str | None:
    if not rows:
        return None
    return f"{mean(row['kept'] for row in rows):.1%}, KL {mean(row['kl'] for row in rows):.4f}"
