"""The command ``unisparse-flex``. Needs the extra ``cli``, as it says where that is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..command_line import PROGRAM

MODULES = ("click", "jinja2")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0 if it did what was asked; 1 if it could not, or `doctor` found problems; 2 for wrong
        arguments; 130 if it was interrupted.
    """
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        print(
            f"{PROGRAM} needs {' and '.join(missing)}, not installed here; "
            "run: pip install 'unisparse-flex[cli]'",
            file=sys.stderr,
        )
        return 1
    from .app import run

    return run(sys.argv[1:] if argv is None else argv)


__all__ = ["MODULES", "PROGRAM", "main"]
