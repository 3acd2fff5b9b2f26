"""``unisparse-flex doctor``."""

from __future__ import annotations

import click

from ..progress import Progress
from . import PROGRAM
from .options import json_option, quiet_option
from .output import print_json, wrap_beside

# Words, not colours, say what a finding means.
COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command(
    epilog=f"""\b
Example:
  {PROGRAM} doctor --json

\b
Exit codes:
  0  no problem
  1  something does not work; its fix stands below it""",
)
@click.option(
    "--compile/--no-compile",
    "compile_check",
    default=True,
    show_default=True,
    help="Compile a small sparse call and compare it with dense attention masked to its blocks.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Time attention on this device, about a minute, so that the library knows from which "
    "length on sparse attention is faster here; kept for later runs.",
)
@json_option
@quiet_option
def doctor(compile_check: bool, measure: bool, as_json: bool, quiet: bool) -> int:
    """Check this machine: versions, backend, kernels, compiler; with a fix for each finding."""
    from ..doctor import examine

    with Progress("doctor", shown=not quiet) as progress:
        examination = examine(compile_check=compile_check, measure=measure, show=progress.show)
    if as_json:
        print_json(examination.to_json())
    else:
        width = max(len(finding.name) for finding in examination.findings)
        before = width + 11
        for finding in examination.findings:
            status = click.style(f"{finding.status:7}", fg=COLORS[finding.status])
            detail = finding.detail + (f"\nfix: {finding.fix}" if finding.fix else "")
            lines = wrap_beside(detail, before)
            click.echo(f"{status}  {finding.name:{width}}  {lines}")
        count = len(examination.problems)
        click.echo("no problem" if count == 0 else f"problems: {count}")
    return 1 if examination.problems else 0
