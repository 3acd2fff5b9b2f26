"""What commands write: JSON to standard output, files with a line that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .failures import failures


def print_json(values: Any) -> None:
    """Prints JSON that any parser reads."""
    click.echo(json.dumps(values, indent=2, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Writes a file; its folder is made."""
    with failures(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def say_written(paths: list[Path], *, quiet: bool = False) -> None:
    """Names the files written, on standard error: standard output may be for a program."""
    if not quiet:
        for path in paths:
            click.echo(f"wrote {path}", err=True)
