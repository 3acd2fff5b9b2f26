"""The tables of the files of `bench.distributed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import markdown


def four_digits(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


COLUMNS: dict[str, markdown.Format] = {
    "what": "{}",
    "devices": "{}",
    "tokens": "{}",
    "ms": four_digits,
    "over dense": "{:.2f}x",
    "efficiency": "{:.0%}",
    "received MB": four_digits,
    "peak GiB": "{:.3g}",
}
TITLES = {
    "context_parallel": "Attention of one layer, tokens over devices",
    "tensor_parallel": "First token of the model, heads over devices",
    "context_model": "First token of the model, tokens over devices",
}


def describe(result: Mapping[str, Any], name: str) -> str:
    """The tables of one file, and what its selections were compared with."""
    device, versions = result["device"], result["versions"]
    title = f"{name}: {result['ranks']} x {device}, {result['backend']}, torch {versions['torch']}"
    parts = [*markdown.heading(title, result), f"{result['statistic'].capitalize()}."]
    for part, title in TITLES.items():
        rows = [row for row in result["rows"] if row.get("part") == part]
        timed = [row for row in rows if "ms" in row]
        if timed:
            lines = [_cells(row, timed) for row in timed]
            parts += [f"### {title}", markdown.table(COLUMNS, lines)]
        parts += [_selection(row) for row in rows if row.get("variant") == "selection"]
        parts += [_logits(row) for row in rows if row.get("variant") == "logits"]
        parts += [
            f"{row.get('variant', part)} on {row.get('ranks')}: {'; '.join(row['errors'].values())}"
            for row in rows
            if row.get("errors")
        ]
    return markdown.page(*parts)


def _cells(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[Any]:
    what = row["variant"]
    if "density_expected" in row:
        what += f" {row['density_expected']:.0%}"
    speedup = None
    if row["variant"] == "sparse":
        dense = [
            other["ms"]
            for other in rows
            if other["variant"] != "sparse" and other["ranks"] == row["ranks"]
        ]
        speedup = min(dense) / row["ms"] if dense else None
    received, peak = row.get("bytes_received_per_rank"), row.get("peak_bytes")
    return [
        what,
        row["ranks"],
        row["tokens"],
        row["ms"],
        speedup,
        row.get("scaling_efficiency"),
        None if received is None else received / 1e6,
        None if peak is None else peak / 2**30,
    ]


def _selection(row: Mapping[str, Any]) -> str:
    compared = row.get("compared_blocks", row.get("compared_blocks_per_layer"))
    if compared is None:
        return "The selections were not compared."
    text = f"Against one device at {row['tokens']} tokens: {row['differing_blocks']} "
    if "compared_blocks" in row:
        text += f"of {compared} blocks differ"
    else:
        text += f"blocks differ in all layers together, of {compared} in each"
    if "differing_blocks_first_layer" in row:
        text += f", {row['differing_blocks_first_layer']} of them in the first layer"
    if "output_relative_error" in row:
        text += f"; relative error of the output {row['output_relative_error']:.1e}"
    return text + "."


def _logits(row: Mapping[str, Any]) -> str:
    errors = [
        f"{variant} {row[name]:.1e}"
        for variant in ("sparse", "dense")
        if (name := f"{variant}_logits_relative_error") in row
    ]
    if not errors:
        return "The logits were not compared."
    return (
        f"Relative error of the last token's logits against one device at {row['tokens']} tokens: "
        f"{', '.join(errors)}."
    )
