"""``unisparse-flex bench``: the benchmarks are in the repository, not in the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from . import PROGRAM
from .options import json_option
from .output import print_json

BENCHMARKS = {
    "attention": "block-sparse attention against every dense kernel, on one GPU",
    "prefill": "time to first token of a model, dense and sparse, on one GPU",
    "quality": "KL, recall and tasks against density, on a real model",
    "cost_rates": "rates of this device for the cost model",
    "cost_decision": "whether the cost model decides for the faster kernel",
    "expected_density": "densities that the default selector keeps, by length",
    "video": "attention over patches of clips",
    "distributed": "attention over several devices: tensor and context parallel",
}
CHECKOUT = Path(__file__).resolve().parents[2]
WAY = "clone the repository of unisparse-flex and there run: python -m bench.NAME --help"


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"""\b
Example:
  {PROGRAM} bench
  {PROGRAM} bench attention --help""",
)
@click.argument("name", metavar="[NAME]", required=False, type=click.Choice(list(BENCHMARKS)))
@click.argument("arguments", metavar="[ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
@json_option
def bench(name: str | None, arguments: tuple[str, ...], as_json: bool) -> int:
    """List the benchmarks, or run NAME with its own ARGUMENTS from a checkout.

    They are not in the wheel: they need a checkout, its packages and files of results beside them.
    """
    checkout = find_checkout()
    if name is None:
        if as_json:
            where = None if checkout is None else str(checkout)
            print_json({"schema": 1, "benchmarks": BENCHMARKS, "checkout": where})
            return 0
        width = max(map(len, BENCHMARKS))
        for each, purpose in BENCHMARKS.items():
            click.echo(f"{each:{width}}  {purpose}")
        click.echo(WAY if checkout is None else f"run one with: {PROGRAM} bench NAME --help")
        return 0
    if checkout is None:
        raise click.ClickException(f"the benchmarks are not in an installed package; {WAY}")
    if as_json:
        raise click.UsageError("--json lists the benchmarks; each writes its own JSON (--output)")
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    return subprocess.run(command, cwd=checkout, check=False).returncode


def find_checkout() -> Path | None:
    """The repository that this code runs from, if it does."""
    return CHECKOUT if (CHECKOUT / "bench" / "__main__.py").is_file() else None
