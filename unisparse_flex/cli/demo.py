"""``unisparse-flex demo``: the demo, with its own arguments."""

from __future__ import annotations

import click

from . import PROGRAM


@click.command(
    short_help="Compare dense and sparse on a small real model.",
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> int:
    """Compare dense and sparse on a small real model (demo --help has its options)."""
    from ..demo import main

    try:
        return main(arguments, program=f"{PROGRAM} demo")
    except SystemExit as end:
        # What argparse ends a process with: 0 after its help, 2 for wrong arguments.
        return end.code if isinstance(end.code, int) else 2
