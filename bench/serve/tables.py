"""The tables of one file of `bench.serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .. import markdown

MILLISECONDS = markdown.milliseconds


def describe(result: Mapping[str, Any], name: str) -> str:
    """A table for every case that the file has."""
    shape = "" if result["weights"] == "real" else "the shape of "
    title = (
        f"{name}: {shape}{result['model']}, {result['layers']} layers, {result['weights']} "
        f"weights, {result['dtype']}, vLLM {result['vllm']}, parent {result['parent']}, "
        f"{result['device']}"
    )
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["case"], []).append(row)
    parts = [table(rows[case]) for case, table in TABLES.items() if case in rows]
    return markdown.page(*markdown.heading(title, result), *parts)


def _gate(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "all blocks kept: log-probabilities compared": "{}",
        "largest difference": "{:.2g}",
        "passed": "{}",
    }
    lines = [[row.get(n) for n in ("compared", "largest_difference", "passed")] for row in rows]
    return markdown.table(columns, lines)


def _first_token(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "prompt": "{}",
        "chunk": "{}",
        "density": markdown.percent,
        "first token, parent, ms": MILLISECONDS,
        "sparse, ms": MILLISECONDS,
        "parent / sparse": "{:.2f}",
        "summaries, of the cache": markdown.percent,
        "more at the peak, MiB": "{:.0f}",
    }
    return markdown.table(columns, map(_first_token_line, rows))


def _first_token_line(row: Mapping[str, Any]) -> list[Any]:
    ours, theirs = (row.get(f"{side}_peak_bytes") for side in ("sparse", "parent"))
    more = None if ours is None or theirs is None else (ours - theirs) / 2**20
    return [
        row["prompt"],
        row["chunk"],
        row.get("density"),
        _median(row, "parent_ms"),
        _median(row, "sparse_ms"),
        row.get("ratio"),
        _summaries(row),
        more,
    ]


def _lengths(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "different lengths": "{}",
        "kernels compiled while warming up": "{}",
        "compiled afterwards": "{}",
        "first / second request, median": "{:.2f}",
        "worst": "{:.2f}",
        "parent, median": "{:.2f}",
        "parent, worst": "{:.2f}",
    }
    lines = []
    for row in rows:
        line = [
            len(row["lengths"]),
            sum(row.get("compiled_while_warming_up", {}).values()),
            sum(row.get("compiled_afterwards", {}).values()),
        ]
        for side in ("sparse", "parent"):
            ratios = row.get(f"{side}_first_over_second", [])
            line += [median(ratios) if ratios else None, max(ratios, default=None)]
        lines.append(line)
    return markdown.table(columns, lines)


def _batch(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "prompts": "{}",
        "at once": "{}",
        "sparse rows": "{}",
        "tokens/s, parent": "{:.0f}",
        "plug-in": "{:.0f}",
        "ratio": "{:.3f}",
        "between tokens, parent, ms": MILLISECONDS,
        "plug-in, ms": MILLISECONDS,
        "latency ratio": "{:.3f}",
    }
    lines = [
        [
            row["prompt"],
            row["requests"],
            row.get("sparse_rows"),
            _median(row, "parent_tokens_per_second"),
            _median(row, "sparse_tokens_per_second"),
            row.get("tokens_per_second_ratio"),
            _median(row, "parent_latency_ms"),
            _median(row, "sparse_latency_ms"),
            row.get("latency_ms_ratio"),
        ]
        for row in rows
    ]
    return markdown.table(columns, lines)


def _beside(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "prompt beside": "{}",
        "chunk": "{}",
        "between tokens, parent, ms": MILLISECONDS,
        "sparse, ms": MILLISECONDS,
        "ratio": "{:.2f}",
        "longest, parent, ms": MILLISECONDS,
        "longest, sparse, ms": MILLISECONDS,
    }
    lines = [
        [
            row["prompt"],
            row["chunk"],
            _median(row, "parent_beside_ms"),
            _median(row, "sparse_beside_ms"),
            row.get("median_ratio"),
            max(row.get("parent_beside_ms", []), default=None),
            max(row.get("sparse_beside_ms", []), default=None),
        ]
        for row in rows
    ]
    return markdown.table(columns, lines)


def _decode(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "requests": "{}",
        "prompt": "{}",
        "layers": "{}",
        "keys read": markdown.percent,
        "a step, parent, ms": MILLISECONDS,
        "sparse, ms": MILLISECONDS,
        "tokens/s, parent": "{:.0f}",
        "sparse": "{:.0f}",
        "sparse / parent": "{:.2f}",
        "summaries, of the cache": markdown.percent,
    }
    lines = []
    for row in rows:
        steps = [_median(row, f"{side}_step_ms") for side in ("parent", "sparse")]
        rates = [None if step is None else 1e3 * row["requests"] / step for step in steps]
        sizes = [row[name] for name in ("requests", "prompt", "layers")]
        density = row.get("decode_density")
        lines.append([*sizes, density, *steps, *rates, row.get("ratio"), _summaries(row)])
    return markdown.table(columns, lines)


def _decode_attention(rows: Sequence[Mapping[str, Any]]) -> str:
    # Files of an earlier version do not count the summaries of new keys among what is sparse.
    counted = any("choice_with_update_us" in row for row in rows)
    columns: dict[str, tuple[str, markdown.Format]] = {
        "requests": ("requests", "{}"),
        "prompt": ("keys of each", "{}"),
        "parent_us": ("attention of a layer, parent, us", "{:.0f}"),
        "sparse_us": ("summaries, choice and attention, us", "{:.0f}"),
        "ratio": ("parent / sparse", "{:.2f}"),
        "choice_us": ("choice alone, us", "{:.1f}"),
        "choice_with_update_us": ("with summaries of new keys, us", "{:.1f}"),
        "update_us": ("summaries of new keys by themselves, us", "{:.1f}"),
        "update_page_us": ("at the end of pages, us", "{:.1f}"),
    }
    if not counted:
        columns["sparse_us"] = ("choice and attention, us", "{:.0f}")
        del columns["choice_with_update_us"]
    return markdown.table(
        dict(columns.values()), [[row.get(name) for name in columns] for row in rows]
    )


def _summaries(row: Mapping[str, Any]) -> float | None:
    if not row.get("cache_bytes"):
        return None
    # Files of an earlier version name the means alone.
    taken: int = row.get("summaries_bytes") or row["means_bytes"]
    return taken / row["cache_bytes"]


def _needle(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, markdown.Format] = {
        "text": "{}",
        "needle at": "{:.0%}",
        "prompt": "{}",
        "chunk": "{}",
        "density": markdown.percent,
        "found, parent": _yes_no,
        "sparse": _yes_no,
        "same answer": _yes_no,
    }
    names = ("text", "depth", "prompt", "chunk", "density")
    found = ("parent_found", "sparse_found", "same_tokens")
    return markdown.table(columns, [[row.get(name) for name in (*names, *found)] for row in rows])


def _yes_no(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _median(row: Mapping[str, Any], name: str) -> float | None:
    return median(row[name]) if row.get(name) else None


TABLES = {
    "gate": _gate,
    "first-token": _first_token,
    "lengths": _lengths,
    "batch": _batch,
    "beside": _beside,
    "needle": _needle,
    "decode-attention": _decode_attention,
    "decode": _decode,
}
