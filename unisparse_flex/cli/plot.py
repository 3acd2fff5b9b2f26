"""``unisparse-flex plot SOURCE...``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import click

from ..progress import Progress
from . import PROGRAM
from .arguments import check_model, folder_to_write
from .failures import failures, require, wrong_content
from .options import (
    MODEL_OPTIONS,
    SPARSE_OPTIONS,
    create_subject,
    json_option,
    min_length_option,
    quiet_option,
    with_options,
)
from .output import print_json, say_source, say_written, text_columns

if TYPE_CHECKING:
    from ..reports import DensitySeries

MAX_FILE_BYTES = 50_000_000
WRITE = f"{PROGRAM} explain MODEL --json > explain.json"
# Of a selector in a legend.
NAME_CHARACTERS = 48


def sources_argument(
    ctx: click.Context, _: click.Parameter, sources: tuple[str, ...]
) -> tuple[str, ...]:
    """Sources are one MODEL, or files."""
    files = [source for source in sources if source.endswith(".json")]
    if (files and len(files) != len(sources)) or (len(sources) > 1 and not files):
        raise click.UsageError(f"SOURCE must be one MODEL or files *.json, got {' '.join(sources)}")
    if ctx.resilient_parsing:
        return sources
    require(["matplotlib"], purpose="plot", install="'unisparse-flex[viz]'")
    for file in files:
        if not os.path.isfile(file):
            raise click.UsageError(f"there is no file {file}; to write one run: {WRITE}")
    if not files:
        check_model(
            sources[0],
            allow_download=bool(ctx.params.get("allow_download")),
            otherwise=", or files *.json that explain --json or the demo wrote",
        )
    return sources


@click.command(
    epilog=f"""\b
Examples:
  {PROGRAM} plot smollm2 --text prompt.txt --output figures
  {PROGRAM} plot explain.json demo-output/demo.json --format pdf""",
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, callback=sources_argument)
@with_options(
    click.option(
        "--output",
        "-o",
        type=click.Path(path_type=Path),
        default=Path("figures"),
        show_default=True,
        metavar="DIR",
        callback=folder_to_write,
        help="Folder of the figures.",
    ),
    click.option(
        "--format",
        "suffix",
        type=click.Choice(["png", "pdf", "svg"]),
        default="png",
        show_default=True,
    ),
    click.option(
        "--heads",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        metavar="N",
        help="Most heads in a block map.",
    ),
    *MODEL_OPTIONS,
    *SPARSE_OPTIONS,
    min_length_option(0),
    json_option,
    quiet_option,
)
def plot(
    sources: tuple[str, ...],
    output: Path,
    suffix: str,
    heads: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw density by layer, and of a model the blocks that each layer and head keeps.

    SOURCE is one MODEL, which reads a prompt, or files that explain --json or the demo wrote.
    """
    files = [Path(source) for source in sources if source.endswith(".json")]
    density = output / f"density-by-layer.{suffix}"
    if files:
        from ..reports import draw_densities

        series = [read_densities(path) for path in files]
        with failures(f"write into {output}"):
            written = [draw_densities(series, density, title="Density by attention call")]
    else:
        written = _plot_model(sources[0], output, suffix, heads, not quiet, options)
    if as_json:
        print_json({"schema": 1, "figures": [str(path) for path in written]})
    say_written(written, quiet=quiet or as_json)


def _plot_model(
    model: str, output: Path, suffix: str, heads: int, shown: bool, options: dict[str, Any]
) -> list[Path]:
    from ..reports import DensitySeries, collect_blocks, draw_block_maps, draw_densities
    from .prompts import model_inputs

    with Progress("plot", shown=shown) as progress:
        subject = create_subject(model, progress=progress, **options)
        if shown:
            for line in say_source(subject.source, text_columns()):
                click.echo(line, err=True)
        progress.total = getattr(subject.loaded.model.config, "num_hidden_layers", 0) or 0
        with failures(f"plot {model}"):
            blocks = collect_blocks(
                subject.loaded.model,
                model_inputs(subject.loaded.model, subject.input_ids),
                show=progress.advance,
            )
        if not blocks:
            raise click.ClickException(f"cannot plot {model}: it made no attention call")
        title = f"{model}, {subject.settings['prompt']}"
        progress.show("draw")
        with failures(f"write into {output}"):
            maps = draw_block_maps(
                blocks, output / f"block-maps.{suffix}", title=f"Blocks kept: {title}", heads=heads
            )
            series = DensitySeries.of(shorten(subject.setting, NAME_CHARACTERS), blocks)
            path = output / f"density-by-layer.{suffix}"
            return [*maps, draw_densities([series], path, title=f"Density by layer: {title}")]


def read_densities(path: Path) -> DensitySeries:
    """Reads the densities in a file of ``explain --json`` or of the demo.

    Raises:
        click.ClickException: It cannot be read or holds none.
    """
    from ..reports import DensitySeries

    with wrong_content(f"read {path}"):
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"a file must have at most {MAX_FILE_BYTES} bytes, got more")
        values = json.loads(data)
        rows = values.get("calls", values.get("layers")) if isinstance(values, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                "it must hold calls (explain --json) or layers (the demo), got neither; to "
                f"write one run: {WRITE}"
            )
        densities = tuple(_density(row) for row in rows)
        return DensitySeries(name=f"{values.get('model', '')} ({path.name})", densities=densities)


def _density(row: dict[str, Any]) -> float | None:
    value = row.get("density")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"density must be a number in [0, 1] or null, got {value!r}")
    return float(value)
