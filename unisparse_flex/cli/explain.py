"""``unisparse-flex explain MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command_line import CommandLine
from ..progress import Progress
from ..wrapping import wrap
from . import PROGRAM
from .arguments import ChecksFiles, model_argument, typed_line
from .failures import failures
from .measuring import DEFAULT_LENGTH, LEAST_LENGTH
from .options import (
    MODEL_OPTIONS,
    SPARSE_OPTIONS,
    Subject,
    create_subject,
    html_option,
    json_option,
    min_length_option,
    quiet_option,
    with_options,
)
from .output import print_json, say_written, text_columns, write_text

if TYPE_CHECKING:
    from ..reports import ExplainReport


@click.command(
    cls=ChecksFiles,
    epilog=f"""\b
Examples:
  {PROGRAM} explain smollm2
  {PROGRAM} explain smollm2 --tokens 8192 --measure --html explain.html
  {PROGRAM} explain ./my-model --text prompt.txt --json > explain.json""",
)
@click.argument("model", callback=model_argument)
@with_options(
    html_option,
    click.option(
        "--measure",
        is_flag=True,
        help="Also time every call, dense and sparse; compiles once for each shape.",
    ),
    *MODEL_OPTIONS,
    *SPARSE_OPTIONS,
    min_length_option(),
    json_option,
    quiet_option,
)
def explain(
    model: str, html: Path | None, measure: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Say what each attention call of MODEL does: sparse or dense, why, density and time.

    The model reads a prompt once, uncompiled, with the selector in place.
    """
    from ..reports import render_page, report_model
    from .prompts import model_inputs

    with Progress("explain", shown=not quiet) as progress:
        subject = create_subject(model, progress=progress, **options)
        progress.total = getattr(subject.loaded.model.config, "num_hidden_layers", 0) or 0
        with failures(f"explain {model}"):
            report = report_model(
                subject.loaded.model,
                model_inputs(subject.loaded.model, subject.input_ids),
                name=subject.name,
                settings=subject.settings,
                line=_line_of(subject),
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


def _line_of(subject: Subject) -> CommandLine:
    """What `speed` and `quality` are to go on with: a text that is short is read whole there too.

    A prompt that is too short for them is left out.
    """
    from .models import context_length

    line, tokens = typed_line(subject.name), subject.input_ids.shape[1]
    options = dict(line.options)
    if tokens < LEAST_LENGTH:
        options.pop("--tokens", None)
        options.pop("--text", None)
    elif tokens < min(DEFAULT_LENGTH, context_length(subject.loaded.model) or DEFAULT_LENGTH):
        options["--tokens"] = (str(tokens),)
    return CommandLine(subject.name, options)


def format_report(report: ExplainReport) -> str:
    """The report as text: a verdict, what was asked, the table, what was measured, what is next."""
    from ..reports import MANY_LINES

    explanation, columns = report.explanation, text_columns()
    heading = f"{report.model}: {report.model_class}, {report.dtype} on {report.device}"
    settings = (f"{name}: {value}" for name, value in report.settings.items())
    lines = [explanation.verdict, "", heading, *settings]
    table = explanation.table(columns).splitlines()
    if report.calls:
        lines += ["", *table]
    if report.measured_ms is not None:
        lines += ["", *_measured_table(report)]
    again = [explanation.verdict] if len(table) > MANY_LINES else []
    lines += [*explanation.notes(), *again, f"next: {explanation.next_step}"]
    return "\n".join(wrap(line, columns) for line in lines)


def _measured_table(report: ExplainReport) -> list[str]:
    timed = [(call, call.time) for call in report.calls if call.time is not None]
    width = max(len(call.record.layer) for call, _ in timed)
    lines = [f"{'measured ms':{width}}  {'dense':>8}  {'sparse':>8}"]
    for call, time in timed:
        sparse = "" if call.shown_sparse_ms is None else f"{call.shown_sparse_ms:.2f}"
        lines.append(f"{call.record.layer:{width}}  {time.dense_ms:8.2f}  {sparse:>8}".rstrip())
    if report.measured_ms is not None:
        dense, decided = report.measured_ms
        lines.append(f"measured, attention only: {decided:.1f} ms, all dense {dense:.1f} ms")
    return lines
