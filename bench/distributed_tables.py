"""Markdown tables of bench.distributed's files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .tables import markdown

COLUMNS = {
    "variant": "what",
    "ranks": "devices",
    "tokens": "tokens",
    "ms": "ms",
    "speedup": "over dense",
    "scaling_efficiency": "efficiency",
    "bytes_received_per_rank": "received MB",
    "peak_bytes": "peak GiB",
}
TITLES = {
    "context_parallel": "Attention of one layer, tokens over devices",
    "tensor_parallel": "First token of the model, heads over devices",
    "context_model": "First token of the model, tokens over devices",
}


def describe(result: Mapping[str, Any], name: str) -> str:
    """The tables of one file, and what its selections were compared with."""
    device, versions = result["device"], result["versions"]
    parts = [
        f"{name}: {result['ranks']} x {device}, {result['backend']}, torch {versions['torch']}",
        f"`{shlex.join(result['command'])}`",
    ]
    if "stopped" in result:
        parts.append(f"Stopped: {result['stopped']}.")
    parts.append(f"{result['statistic'].capitalize()}.")
    for part, title in TITLES.items():
        rows = [row for row in result["rows"] if row.get("part") == part]
        timed = [row for row in rows if "ms" in row]
        if timed:
            lines = [_cells(row, timed) for row in timed]
            parts += [f"### {title}", markdown(tuple(COLUMNS.values()), lines)]
        parts += [_selection(row) for row in rows if row.get("variant") == "selection"]
        parts += [_logits(row) for row in rows if row.get("variant") == "logits"]
        parts += [
            f"{row.get('variant', part)} on {row.get('ranks')}: {'; '.join(row['errors'].values())}"
            for row in rows
            if row.get("errors")
        ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    what = row["variant"]
    if "density_expected" in row:
        what += f" {row['density_expected']:.0%}"
    speedup = ""
    if row["variant"] == "sparse":
        dense = [
            other["ms"]
            for other in rows
            if other["variant"] != "sparse" and other["ranks"] == row["ranks"]
        ]
        speedup = f"{min(dense) / row['ms']:.2f}x" if dense else ""
    efficiency, received = row.get("scaling_efficiency"), row.get("bytes_received_per_rank")
    peak = row.get("peak_bytes")
    return [
        what,
        str(row["ranks"]),
        str(row["tokens"]),
        _number(row["ms"]),
        speedup,
        "" if efficiency is None else f"{efficiency:.0%}",
        "" if received is None else _number(received / 1e6),
        "" if peak is None else f"{peak / 2**30:.3g}",
    ]


def _number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


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
