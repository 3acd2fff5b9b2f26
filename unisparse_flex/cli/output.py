"""What commands write: JSON to standard output, files with a line that names them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from ..wrapping import wrap
from .failures import failures

# What is said before the source of settings.
SOURCE = "settings from"


def print_json(values: Any) -> None:
    """Prints JSON that any parser reads."""
    click.echo(json.dumps(values, indent=2, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Writes a file; its folder is made."""
    with failures(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def say_written(paths: list[Path], *, quiet: bool = False, replaced: bool = False) -> None:
    """Names the files written, on standard error: standard output may be for a program.

    Args:
        paths: The files.
        quiet: Whether nothing is said.
        replaced: Whether they were there before.
    """
    if not quiet:
        for path in paths:
            click.echo(f"{'replaced' if replaced else 'wrote'} {path}", err=True)


def say_source(source: str | None, columns: int) -> list[str]:
    """The line that says where settings come from that were saved with the model, if any were."""
    return [] if source is None else [wrap(f"{SOURCE}: {source}", columns)]


def text_columns() -> int:
    """Columns of the terminal, at least 80; 80 where standard output is something else."""
    return max(shutil.get_terminal_size((80, 24)).columns, 80) if sys.stdout.isatty() else 80


def wrap_beside(text: str, indent: int) -> str:
    """Text to the right of something else, its long lines broken."""
    room = text_columns() - indent
    lines = [part for line in text.splitlines() for part in wrap(line, room).splitlines()]
    return ("\n" + " " * indent).join(lines)
