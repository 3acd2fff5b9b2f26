"""``unisparse-flex demo``: dense and sparse, side by side, on a small real model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from .. import PROGRAM
from ..arguments import file_to_write, folder_to_write, share_argument
from ..choices import BUNDLED_CONTEXT, SELECTOR_NAMES, TEXT_NAMES
from ..failures import wrong_arguments
from .options import SHORTEST_PROMPT, STDOUT, DemoOptions, check_ranges
from .show import require_what_is_needed, show_demo

DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(DemoOptions)}
EXAMPLES = f"""\b
Examples:
  {PROGRAM} demo                             8192 tokens of prose
  {PROGRAM} demo --text code --top-p 0.97    code, more blocks kept
  {PROGRAM} demo --tokens 1024 --no-compile  a first look, no compiler
  {PROGRAM} demo --depth 0.8 --seed 3        another needle, elsewhere

At depth 0.1 of a full prompt this small model misses most needles, dense or not."""


@contextmanager
def _wrong_options() -> Iterator[None]:
    """As `wrong_arguments`, for errors that begin with a setting's name, as Python spells it."""
    with wrong_arguments():
        try:
            yield
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            spelled = f"--{name.replace('_', '-')}" if name in DEFAULT else name
            raise ValueError(f"{spelled} {rest}") from error


class _Demo(click.Command):
    """Keeps what was typed, which the JSON file says, and checks it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = [PROGRAM, "demo", *args]
        rest = super().parse_args(ctx, args)
        with _wrong_options():
            check_ranges(**ctx.params)
        return rest


@click.command(cls=_Demo, epilog=EXAMPLES)
@click.option(
    "--tokens",
    type=int,
    metavar="N",
    default=DEFAULT["tokens"],
    show_default=True,
    help=f"Length of the prompt, {SHORTEST_PROMPT} to {BUNDLED_CONTEXT}.",
)
@click.option(
    "--text",
    type=click.Choice(TEXT_NAMES),
    default=DEFAULT["text"],
    show_default=True,
    help="King James Bible, standard library sources or Python language reference.",
)
@click.option(
    "--depth",
    type=float,
    metavar="X",
    default=DEFAULT["depth"],
    show_default=True,
    help="Where the needle goes, 0 (start) to 1 (end).",
)
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=DEFAULT["seed"],
    show_default=True,
    help="Picks the needle and the excerpt.",
)
@click.option(
    "--selector",
    type=click.Choice(SELECTOR_NAMES),
    default=DEFAULT["selector"],
    show_default=True,
    help="Which blocks are kept.",
)
@click.option(
    "--top-p",
    type=float,
    metavar="P",
    callback=share_argument,
    help="Share of the estimated attention mass that each row of blocks keeps.  [default: the "
    "selector's own rule]",
)
@click.option(
    "--block-size",
    type=int,
    metavar="N",
    default=DEFAULT["block_size"],
    show_default=True,
    help="Tokens per block.",
)
@click.option(
    "--min-length",
    type=int,
    metavar="N",
    help="Fewest keys for which attention is sparse.  [default: 4096, or --tokens if that is "
    "less; the library's own default on CUDA is higher]",
)
@click.option(
    "--compile/--no-compile",
    default=DEFAULT["compile"],
    show_default=True,
    help="Compile the optimized model; eagerly it keeps the same blocks, slower, without a wait "
    "for the compiler.",
)
@click.option(
    "--compile-dense/--no-compile-dense",
    default=None,
    help="Also run the compiled dense model.  [default: only on CUDA, on CPU eager is faster]",
)
@click.option(
    "--repeats",
    type=int,
    metavar="N",
    help="Timed prefills of each model, in turn, of which the median counts.  [default: 5 on "
    "CUDA, 1 on CPU]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=DEFAULT["output"],
    show_default=True,
    callback=folder_to_write,
    help="Folder of the figure.",
)
@click.option(
    "--json",
    type=click.Path(path_type=Path),
    metavar="PATH",
    is_flag=False,
    flag_value=str(STDOUT),
    callback=file_to_write,
    help="The JSON file (demo.json in --output); without PATH, or with -, JSON goes to standard "
    "output and everything else to standard error.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print only the paths of the files written.")
@click.pass_obj
def demo(command: list[str], /, **values: Any) -> None:
    """Compare dense and sparse on a small real model.

    SmolLM2-135M-Instruct reads a long prompt with a needle in it and answers a question about the
    needle: dense, then optimized by unisparse_flex. Prints both side by side and draws the blocks
    that every layer keeps. Runs offline, on the first GPU or else on the CPU (a few minutes).
    """
    with _wrong_options():
        options = DemoOptions(**values)
    require_what_is_needed(options)
    show_demo(options, command)
