"""Selection where logits lie far apart: density, time, and what the reference would keep.

python -m bench.wide_logits [--lengths 8192,32768] [--gains 1,2,4,6,10] [--before FILE]
    [--max-seconds N] [--output FILE]

Queries and keys are multiplied by each gain, as larger projections would. --before takes the file
that another version of the kernels left, and sets its numbers beside these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from unisparse_flex import attention
from unisparse_flex.block_masks import kernels
from unisparse_flex.passes.decision import device_name
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .calls import Heads, compile_apart, create_inputs
from .record import FOLDER, Record, guarded, numbers
from .timing import STATISTIC, graph_ms, kernel_ms, plain_ms

LENGTHS, GAINS = (8192, 32768), (1.0, 2.0, 4.0, 6.0, 10.0)
HEADS = Heads(query=32, key=8, head_dim=128)
# Queries of the first head that tell how far logits deviate.
SAMPLED = 256
KERNELS = ("_pool", "_score", "_select")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.wide_logits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS)
    parser.add_argument("--gains", type=numbers(float), default=GAINS)
    parser.add_argument("--before", type=Path, help="the file of another version")
    parser.add_argument("--max-seconds", type=float, default=300.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/wide-logits-<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.wide_logits: no CUDA device here")
    before = json.loads(options.before.read_text())["rows"] if options.before else []
    name = device_name("cuda").replace(" ", "-")
    record = Record.create(
        "bench.wide_logits",
        "cuda",
        options.output or FOLDER / f"wide-logits-{name}.json",
        options.max_seconds,
        heads=[HEADS.query, HEADS.key, HEADS.head_dim],
        selector=repr(DEFAULT_SELECTOR),
        statistic=STATISTIC,
    )
    with torch.no_grad(), record.stopping():
        record.collect(measure(options.lengths, options.gains))
    print(format_table(record.content["rows"], before))
    print(f"written to {record.output}", flush=True)


def measure(lengths: Sequence[int], gains: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One row for each length and gain."""
    for tokens in lengths:
        torch._dynamo.reset()
        whole = compile_apart(_attend, f"attend_{tokens}")
        query, key, value = create_inputs(HEADS, tokens, torch.bfloat16, "cuda")
        for gain in gains:
            yield _measure_one(whole, query * gain, key * gain, value, gain)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, is_causal=True, enable_gqa=True)


def _measure_one(
    whole: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, gain: float
) -> dict[str, Any]:
    def select() -> Any:
        return DEFAULT_SELECTOR.select(query, key, is_causal=True)

    row: dict[str, Any] = {"tokens": query.shape[2], "gain": gain}
    rows = query[0, 0, -SAMPLED:].float() @ key[0, 0].float().T / HEADS.head_dim**0.5
    row["logit_deviation"] = float(rows.std())
    found = select()
    row["density"] = found.density()

    def compare() -> None:
        with mock.patch.object(kernels, "obstacle", return_value="compared"):
            reference = select()
        row["density_reference"] = reference.density()
        differing = (found.keep != reference.keep).sum() / reference.keep.sum()
        row["differing"] = float(differing)

    guarded(row, "reference", compare)
    torch.cuda.empty_cache()
    lists = select_lists_of(query, key)
    row["selection_ms"] = guarded(row, "selection", lambda: graph_ms(lists))
    row["selection_plain_ms"] = guarded(row, "selection", lambda: plain_ms(lists))
    times = guarded(row, "kernels", lambda: kernel_ms(lists)) or {}
    row["kernels_ms"] = {name: time for name, time in times.items() if name in KERNELS}
    row["whole_ms"] = guarded(row, "whole", lambda: plain_ms(lambda: whole(query, key, value)))
    return row


def select_lists_of(query: Tensor, key: Tensor) -> Callable[[], Any]:
    """Only the selection, as a function without arguments."""
    return lambda: DEFAULT_SELECTOR.select(query, key, is_causal=True).block_lists()


def format_table(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] = ()) -> str:
    """Rows as text; numbers of the same length and gain before stand in brackets."""
    old = {(row["tokens"], row["gain"]): row for row in before}
    lines = [f"{'tokens':>7}{'gain':>6}{'deviation':>10}{'reference':>10}{'differing':>10}"]
    for name in ("density", "selection ms", "whole ms"):
        lines[0] += f"{name:>22}"
    for row in rows:
        line = f"{row['tokens']:7}{row['gain']:6g}{row['logit_deviation']:10.1f}"
        line += _number(row, "density_reference", 10) + _number(row, "differing", 10)
        was = old.get((row["tokens"], row["gain"]), {})
        for field in ("density", "selection_ms", "whole_ms"):
            line += _number(row, field, 11)
            line += f"{'(' + _number(was, field).strip() + ')' if was else '':>11}"
        lines.append(line)
    return "\n".join(lines)


def _number(row: dict[str, Any], field: str, width: int = 0) -> str:
    value = row.get(field)
    return f"{'-' if value is None else format(value, '.4f'):>{width}}"


if __name__ == "__main__":
    main()
