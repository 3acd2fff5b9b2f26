"""What `quality` and `speed` measured, as one page of HTML drawn from their JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, Any

from .page import STYLE, create_environment, format_ms, format_percent, read_part
from .quality_curve import Curve, compute_curve

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = "measured.html.jinja"
QUALITY_COLUMNS = (
    *("text", "setting", "density", "KL to dense", "perplexity", "dense"),
    *("ratio", "same top-1", "sparse calls"),
)
SPEED_COLUMNS = (
    *("run", "first token, ms", "over dense", "density", "KL, last token"),
    *("off dense", "sparse calls", "first call, s", "error"),
)
# A column of such cells alone is left out.
EMPTY = ("", "–")
_BAR_WIDTH = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One run beside the others.

    Attributes:
        name: Of the run.
        ms: Milliseconds.
        percent: Length of its bar, of the longest.
        kind: ``"sparse"``, or ``"dense"`` where no call is sparse.
    """

    name: str
    ms: float
    percent: float
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading with a figure, a table or both below it.

    Attributes:
        title: The heading.
        columns: Names of the table's columns; the first ``left`` hold text, the others numbers.
        rows: Its cells.
        left: How many columns hold text.
        curve: A curve of quality by density.
        bars: Times beside one another.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    curve: Curve | None = None
    bars: Sequence[Bar] = ()


def render_quality(values: Mapping[str, Any]) -> str:
    """Renders what ``unisparse-flex quality --json`` prints; everything in it is escaped.

    Args:
        values: The JSON values.

    Returns:
        A whole HTML document.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed; the extra ``cli`` has it.
    """
    sections = [
        Section(
            title=f"{tokens} tokens, {_judged(values['rows'], tokens)}",
            columns=QUALITY_COLUMNS,
            rows=[_quality_cells(row) for row in values["rows"] if row["tokens"] == tokens],
            left=2,
            curve=compute_curve(
                [mean for mean in values["means"] if mean["tokens"] == tokens],
                dial=values["settings"]["quality"],
            ),
        )
        for tokens in dict.fromkeys(row["tokens"] for row in values["rows"])
    ]
    sections += [_task_section(kind, rows) for kind, rows in values["tasks"].items() if rows]
    return _render(values, f"Quality of sparse attention in {values['model']}", sections)


def render_speed(values: Mapping[str, Any]) -> str:
    """Renders what ``unisparse-flex speed --json`` prints; everything in it is escaped.

    Args:
        values: The JSON values.

    Returns:
        A whole HTML document.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed; the extra ``cli`` has it.
    """
    sections = []
    cells = [_speed_cells(row) for row in values["rows"]]
    filled = [any(cell not in EMPTY for cell in column) for column in zip(*cells, strict=True)]
    for tokens in dict.fromkeys(row["tokens"] for row in values["rows"]):
        rows = [row for row in values["rows"] if row["tokens"] == tokens]
        section = Section(
            title=f"{tokens} tokens of {values['settings']['text']}",
            columns=tuple(compress(SPEED_COLUMNS, filled)),
            rows=[tuple(compress(_speed_cells(row), filled)) for row in rows],
            bars=_bars(rows),
        )
        sections.append(section)
    if values["against"]:
        sections.append(
            Section(
                title="Packages of other work",
                columns=("package", "version", "settings", "run"),
                rows=[
                    (
                        each["name"],
                        each["version"] or "–",
                        ", ".join(f"{k}={v}" for k, v in (each["settings"] or {}).items()),
                        each["status"],
                    )
                    for each in values["against"]
                ],
                left=2,
            )
        )
    return _render(values, f"Time to first token of {values['model']}", sections)


def _judged(rows: Sequence[Mapping[str, Any]], tokens: int) -> str:
    counts = {row["judged"] for row in rows if row["tokens"] == tokens}
    return f"the last {max(counts)} of them judged"


def _quality_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["text"],
        row["setting"],
        format_percent(row["density"]),
        f"{row['kl']:.4f}",
        f"{row['perplexity']:.3f}",
        f"{row['dense_perplexity']:.3f}",
        f"{row['perplexity_ratio']:.3f}",
        format_percent(row["top1_agreement"]),
        f"{row['sparse_calls']} of {row['calls']}",
    )


def _task_section(kind: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    """A line for each task, a column for each setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    scores = {(row["tokens"], row["task"], row["setting"]): row for row in rows}
    lines = []
    for tokens, task in dict.fromkeys((row["tokens"], row["task"]) for row in rows):
        found = [scores[tokens, task, setting] for setting in settings]
        lines.append(
            (
                task,
                str(tokens),
                str(found[0]["samples"]),
                *(format_percent(row["score"]) for row in found),
            )
        )
    names = ["dense" if setting is None else setting for setting in settings]
    return Section(
        title=f"Tasks of {kind}: mean scores",
        columns=("task", "tokens", "samples", *names),
        rows=lines,
    )


def _speed_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "–" if row[name] is None else form.format(row[name])

    calls = f"{row['sparse_calls']} of {row['calls']}" if row["calls"] else "–"
    return (
        row["name"],
        format_ms(row["ms"]),
        number("speedup", "({:.2f}×)" if row.get("told_apart") is False else "{:.2f}×"),
        format_percent(row["density"]),
        number("kl_last_token", "{:.4f}"),
        number("output_error", "{:.1%}"),
        calls,
        number("first_call_seconds", "{:.1f}"),
        row["error"] or "",
    )


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    timed = [row for row in rows if row["ms"] is not None]
    longest = max((row["ms"] for row in timed), default=0.0)
    return [
        Bar(
            name=row["name"],
            ms=row["ms"],
            percent=round(_BAR_WIDTH * row["ms"] / longest, 2),
            kind="sparse" if row["setting"] is not None and row["sparse_calls"] else "dense",
        )
        for row in timed
    ]


def _render(values: Mapping[str, Any], title: str, sections: Sequence[Section]) -> str:
    return _template().render(title=title, values=values, sections=sections, style=read_part(STYLE))


@cache
def _template() -> Template:
    return create_environment().from_string(read_part(TEMPLATE))
