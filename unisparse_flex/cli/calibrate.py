"""``unisparse-flex calibrate MODEL TEXT...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..counted import counted
from ..progress import Progress
from ..shares import say_tenths
from ..wrapping import wrap
from . import PROGRAM
from .arguments import (
    ChecksFiles,
    file_to_write,
    model_argument,
    nats_argument,
    share_argument,
    text_argument,
)
from .failures import failures, wrong_arguments
from .options import MODEL_OPTIONS, json_option, min_length_option, quiet_option, with_options
from .output import print_json, say_written, text_columns, write_text

if TYPE_CHECKING:
    from ..calibrating import Calibrated

OVER_ALL = "the KL is the mean over all positions"
# Advice of the library in Python.
OPTIONS = {
    "min_length=0": "--min-length 0",
    "a larger kl": "a larger --kl",
    "a smaller recall": "a smaller --recall",
}


class _OneTarget(ChecksFiles):
    """Wants one of --recall and --kl."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if (ctx.params.get("recall") is None) == (ctx.params.get("kl") is None):
            raise click.UsageError("give exactly one of --recall and --kl", ctx)
        return rest


@click.command(
    cls=_OneTarget,
    epilog=f"""\b
Example:
  {PROGRAM} calibrate smollm2 prompts.txt --recall 0.95
  {PROGRAM} explain smollm2 --selector calibration.json""",
)
@click.argument("model", callback=model_argument)
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, callback=text_argument)
@with_options(
    click.option(
        "--recall",
        type=float,
        metavar="SHARE",
        callback=share_argument,
        help="Least share of dense attention's mass to keep, in (0, 1].",
    ),
    click.option(
        "--kl",
        type=float,
        metavar="NATS",
        callback=nats_argument,
        help="Most KL to the dense model.",
    ),
    click.option(
        "--output",
        "-o",
        type=click.Path(path_type=Path),
        default=Path("calibration.json"),
        show_default=True,
        metavar="FILE",
        callback=file_to_write,
        help="The file that optimize(model, selector=FILE) takes.",
    ),
    click.option("--per-head", is_flag=True, help="Give each head a threshold of its own."),
    min_length_option(),
    *MODEL_OPTIONS,
    json_option,
    quiet_option,
)
def calibrate(
    model: str,
    texts: tuple[str, ...],
    recall: float | None,
    kl: float | None,
    output: Path,
    per_head: bool,
    min_length: int | None,
    allow_download: bool,
    device: str | None,
    tokens: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find settings of each layer of MODEL that reach a stated quality on texts like yours.

    Each TEXT is a UTF-8 file, or prose, code or topics (installed texts). Give --recall or --kl,
    and prompts as long as those to come (--tokens): the target was looked at for no others.
    Exits with 1, and writes nothing, where every layer would stay dense.
    """
    from ..calibrating import calibrate_or_say_why
    from ..calibration import NOTES
    from .models import load_model, stated_context
    from .prompts import check_tokens, create_input_ids, model_inputs
    from .saved import say_saved

    check_tokens(tokens, stated_context(model))

    with Progress("calibrate", shown=not quiet) as progress:
        progress.show(f"load {model}")
        loaded = load_model(model, allow_download=allow_download, device=device)
        batches = [create_input_ids(loaded, text, tokens) for text in texts]
    inputs = [{**model_inputs(loaded.model, ids)} for ids in batches]
    if kl is not None:
        # All positions are compared.
        for each in inputs:
            each.pop("logits_to_keep", None)
    with failures(f"calibrate {model}"), wrong_arguments():
        calibrated = calibrate_or_say_why(
            loaded.model,
            inputs,
            recall=recall,
            kl=kl,
            min_length=min_length,
            per_head=per_head,
            progress=not quiet,
        )
    found = calibrated.calibration
    remarks = _remarks(calibrated, say_saved(loaded.model))
    if as_json:
        notes = [*([] if kl is None else [OVER_ALL]), *remarks]
        print_json(json.loads(found.to_json()) | {NOTES: notes})
    if calibrated.why_dense is not None:
        why = _in_options(calibrated.why_dense)
        raise click.ClickException(f"all layers stay dense, and nothing was written: {why}")
    replaced = output.exists()
    with failures(f"write {output}"):
        write_text(output, found.to_json())
    if not as_json:
        sparse = len(found.sparse_layers)
        over = " over all positions" if kl is not None else ""
        line = (
            f"{found.quality} {found.reached:.4f}{over} (asked for {found.target:g}), density "
            f"{say_tenths(found.density)}, {sparse} of {counted(len(found.layers), 'layer')} sparse"
        )
        click.echo(wrap(line, text_columns()))
        for remark in remarks:
            click.echo(wrap(remark, text_columns()))
    say_written([output], quiet=quiet, replaced=replaced)


def _remarks(calibrated: Calibrated, saved: str) -> list[str]:
    """What is to be said of the result, beside its numbers.

    Args:
        calibrated: The result.
        saved: Settings saved with the model, in words; empty where there are none.
    """
    from ..calibrating import COARSEST

    remarks = []
    if calibrated.why_dense is not None:
        remarks.append(f"all layers stay dense: {_in_options(calibrated.why_dense)}")
    if calibrated.left_dense is not None:
        remarks.append(_in_options(calibrated.left_dense))
    if calibrated.room_left is not None:
        remarks.append(calibrated.room_left)
    if calibrated.is_coarsest:
        remarks.append(f"this is {COARSEST}")
    if saved:
        remarks.append(f"not used: {saved}, over which the file wins")
    return remarks


def _in_options(text: str) -> str:
    """Advice with the settings of Python as options."""
    for python, option in OPTIONS.items():
        text = text.replace(python, option)
    return text
