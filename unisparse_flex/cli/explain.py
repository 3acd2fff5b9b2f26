"""``unisparse-flex explain MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..progress import Progress
from . import PROGRAM
from .options import (
    MODEL_OPTIONS,
    SPARSE_OPTIONS,
    create_subject,
    json_option,
    quiet_option,
    with_options,
)
from .output import print_json, say_written, write_text
from .prompts import model_inputs


@click.command(
    short_help="Say what each attention call of MODEL does, and why.",
    epilog=f"""\b
Examples:
  {PROGRAM} explain smollm2
  {PROGRAM} explain smollm2 --tokens 8192 --measure --html explain.html
  {PROGRAM} explain ./my-model --text prompt.txt --json > explain.json""",
)
@click.argument("model")
@with_options(
    click.option(
        "--html",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Also write one page of HTML that needs nothing else.",
    ),
    click.option(
        "--measure",
        is_flag=True,
        help="Also time every call, dense and sparse; compiles once for each shape.",
    ),
    *MODEL_OPTIONS,
    *SPARSE_OPTIONS,
    click.option(
        "--min-length",
        type=click.IntRange(min=0),
        metavar="N",
        help="Fewest keys for which attention is sparse.  [default: the cost model decides]",
    ),
    json_option,
    quiet_option,
)
def explain(
    model: str, html: Path | None, measure: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Say what each attention call of MODEL does: sparse or dense, why, density and time.

    The model reads a prompt once, uncompiled, with the selector in place.
    """
    # Here: the command's help must not wait for torch's compiler.
    from ..reports import render_page, report_model

    with Progress("explain", shown=not quiet) as progress:
        subject = create_subject(model, progress=progress, **options)
        progress.total = getattr(subject.loaded.model.config, "num_hidden_layers", 0) or 0
        report = report_model(
            subject.loaded.model,
            model_inputs(subject.loaded.model, subject.input_ids),
            name=subject.name,
            settings=subject.settings,
            device=subject.device,
            measure=measure,
            show=progress.advance,
        )
    if html is not None:
        write_text(html, render_page(report))
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(format_report(report))
    say_written([html] if html else [], quiet=quiet)


def format_report(report: Any) -> str:
    """The report as text: `explain`'s table, and what was measured behind it."""
    lines = [
        f"{report.model}: {report.model_class}, {report.dtype} on {report.device}",
        *(f"{name}: {value}" for name, value in report.settings.items()),
        "",
        str(report.explanation),
    ]
    for word, pair in (("predicted", report.predicted_ms), ("measured", report.measured_ms)):
        if pair is not None:
            dense, decided = pair
            lines.append(
                f"attention in all, {word}: {dense:.1f} ms dense, {decided:.1f} ms as decided"
            )
    if report.is_measured:
        lines += ["", "measured ms, dense and sparse:"]
        lines += [
            f"  {call.record.layer}: {call.time.dense_ms:.2f}, "
            + ("–" if call.time.sparse_ms is None else f"{call.time.sparse_ms:.2f}")
            for call in report.calls
            if call.time is not None
        ]
    return "\n".join(lines)
