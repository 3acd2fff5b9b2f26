"""The library, run late: its import waits for torch, and help and wrong arguments need not."""

from __future__ import annotations

import sys
from types import ModuleType

import click

PACKAGE = __name__.partition(".")[0]


def is_library_loaded() -> bool:
    """Whether the package itself has run, and torch been imported."""
    return "__version__" in vars(sys.modules[PACKAGE])


def load_library() -> ModuleType:
    """Runs the package itself where ``unisparse_flex_command`` put that off, and returns it.

    Raises:
        click.ClickException: It cannot be imported, such as with a torch that it does not know.
    """
    package = sys.modules[PACKAGE]
    spec = package.__spec__
    if not is_library_loaded() and spec is not None and spec.loader is not None:
        try:
            spec.loader.exec_module(package)
        except ImportError as error:
            raise click.ClickException(f"cannot import {PACKAGE}: {error}") from error
    return package
