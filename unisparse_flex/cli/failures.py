"""Errors as a line for people: what cannot be done, and arguments that are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
    """Turns errors of reading, writing and memory into a message: exit code 1.

    Args:
        action: What was tried, such as ``"load the model"``.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, NotImplementedError, MemoryError) as error:
        raise _cannot(action, error) from error
    except RuntimeError as error:
        # torch's, which is not imported for this.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise _cannot(action, error) from error


@contextmanager
def any_failure(action: str) -> Iterator[None]:
    """As `failures`, for what reads files that may hold anything: whatever it raises.

    Args:
        action: What was tried.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        raise _cannot(action, error) from error


def _cannot(action: str, error: Exception) -> click.ClickException:
    """One line: of a longer message the first paragraph, without its line breaks."""
    said = " ".join(str(error).strip().partition("\n\n")[0].split())
    if not isinstance(error, (OSError, ValueError, ImportError, NotImplementedError)):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return click.ClickException(f"cannot {action}: {said or type(error).__name__}")


@contextmanager
def wrong_content(action: str) -> Iterator[None]:
    """As `failures`, but for a file that holds something else than it must: exit code 2.

    Args:
        action: What was tried, such as ``"read a.txt as UTF-8"``.
    """
    with failures(action):
        try:
            yield
        except ValueError as error:
            raise click.UsageError(f"cannot {action}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Missing:
    """What `require` did not find: for what, and what pip is to be given."""

    modules: tuple[str, ...]
    purpose: str
    install: str
    alone: bool


_missing: ContextVar[list[_Missing] | None] = ContextVar("unisparse_missing", default=None)


def require(
    modules: Sequence[str], *, purpose: str, install: str, without_dependencies: bool = False
) -> None:
    """Raises unless modules can be imported: exit code 1, with the command that installs them.

    Args:
        modules: Their names.
        purpose: What needs them.
        install: What pip is to be given for those that are missing.
        without_dependencies: Whether pip is to leave out what these depend on.
    """
    missing = tuple(name for name in modules if find_spec(name) is None)
    if not missing:
        return
    found = _Missing(missing, purpose, install, without_dependencies)
    waiting = _missing.get()
    if waiting is None:
        raise _name([found])
    waiting.append(found)


@contextmanager
def all_missing_at_once() -> Iterator[None]:
    """Has `require` wait for the end of the block, where one error names all that is missing."""
    waiting: list[_Missing] = []
    token = _missing.set(waiting)
    try:
        yield
    finally:
        _missing.reset(token)
    if waiting:
        raise _name(waiting)


def _name(missing: Sequence[_Missing]) -> click.ClickException:
    modules: dict[str, list[str]] = {}
    packages: dict[bool, list[str]] = {False: [], True: []}
    for each in missing:
        modules.setdefault(each.purpose, []).extend(each.modules)
        packages[each.alone].append(each.install)
    needs = (f"{purpose} needs {_list(names)}" for purpose, names in modules.items())
    commands = (
        f"pip install {'--no-deps ' if alone else ''}{' '.join(dict.fromkeys(names))}"
        for alone, names in packages.items()
        if names
    )
    return click.ClickException(
        f"{', '.join(needs)}, not installed here; run: {' && '.join(commands)}"
    )


def _list(names: Sequence[str]) -> str:
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last
