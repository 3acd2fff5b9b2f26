"""Markdown: tables out of rows, and pages whose tables are written anew."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# How the values of a column are written: for `str.format`, or a function.
Format = str | Callable[[Any], str]

SECTION = r"(?P<start><!-- (?P<name>%s) -->)(?:(?!<!--).)*(?P<end><!-- end -->)"


def table(columns: Mapping[str, Format], rows: Iterable[Sequence[Any]]) -> str:
    """A table; empty without rows.

    Args:
        columns: The format of each by its head.
        rows: A value for each column; ``None`` is an empty cell.
    """
    lines = [
        [_cell(value, form) for value, form in zip(row, columns.values(), strict=True)]
        for row in rows
    ]
    if not lines:
        return ""
    lines = [list(columns), ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any, form: Format) -> str:
    if value is None:
        return ""
    return form.format(value) if isinstance(form, str) else form(value)


def milliseconds(ms: float) -> str:
    """Three digits, or all before the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def percent(share: float) -> str:
    """Three digits of a share, fewer where they are zeros."""
    return f"{100 * share:.3g}%"


def heading(title: str, result: Mapping[str, Any]) -> list[str]:
    """The paragraphs before a file's tables: what it is, what was run, and whether it was cut."""
    commands = result.get("commands") or [result["command"]]
    stopped = [f"Stopped: {result['stopped']}."] if "stopped" in result else []
    return [title, *(f"`{shlex.join(command)}`" for command in commands), *stopped]


def page(*parts: str) -> str:
    """Paragraphs and tables, one after the other; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def fill(text: str, names: str, write: Callable[[str], str]) -> str:
    """A page with its sections written anew.

    A section begins with a comment that is its name and ends with a comment "end".

    Args:
        text: The page.
        names: A regular expression of the sections that are written.
        write: What stands in the section of this name, with a line break at its end.
    """

    def section(match: re.Match[str]) -> str:
        return f"{match['start']}\n\n{write(match['name'])}\n{match['end']}"

    return re.sub(SECTION % names, section, text, flags=re.DOTALL)
