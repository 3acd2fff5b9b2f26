"""Errors as a line for people: what cannot be done, and arguments that are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import click


@contextmanager
def wrong_arguments() -> Iterator[None]:
    """Turns the library's own errors about values into wrong usage: exit code 2."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def failures(action: str) -> Iterator[None]:
    """Turns the errors of reading and writing into a message: exit code 1.

    Args:
        action: What was tried, such as ``"load the model"``.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        first = str(error).strip() or type(error).__name__
        raise click.ClickException(f"cannot {action}: {first}") from error


def require(modules: Sequence[str], *, purpose: str, install: str) -> None:
    """Raises unless modules can be imported: exit code 1, with the command that installs them.

    Args:
        modules: Their names.
        purpose: What needs them.
        install: What pip is to be given.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"{purpose} needs {', '.join(missing)}, not installed here; run: pip install {install}"
        )
