"""Predicts on GPUs that nobody measured from which length on sparse attention is faster.

python -m bench.other_gpus [--output FILE]

Nothing runs: rates are those of the measured GPU scaled by what data sheets say of another, as the
library does on a GPU that it meets; forecasts are its cost model's, at the default's expected
density.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.passes.decision import (
    PUBLISHED,
    CallShape,
    DeviceFacts,
    break_even_length_at,
    estimates,
    forecast_at,
)
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import markdown
from .calls import SHAPES
from .record import FOLDER, Record

HEADS = ("llama3-8b", "smollm2", "wide-256")
LENGTHS = (8192, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.other_gpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "other-gpus-simulated.json")
    options = parser.parse_args()
    record = Record.create(
        "bench.other_gpus",
        None,
        options.output,
        math.inf,
        simulated=True,
        selector=repr(DEFAULT_SELECTOR),
        densities="expected by the selector, not measured",
    )
    with record.stopping():
        record.collect(row for facts in PUBLISHED for row in predict(facts))


def predict(facts: DeviceFacts) -> Iterator[dict[str, Any]]:
    """A row for each head shape: break-evens without and with a mask, and ratios at two lengths."""
    (rates,) = estimates(facts)
    for name in HEADS:
        heads = SHAPES[name]
        shape = CallShape(
            batch=1,
            q_heads=heads.query,
            kv_heads=heads.key,
            q_len=0,
            kv_len=0,
            head_dim=heads.head_dim,
            value_dim=heads.head_dim,
            is_causal=True,
            causal_lower_right=False,
            masked=False,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        )
        row: dict[str, Any] = {"gpu": facts.name, "heads": name}
        for kind, masked in (("free", False), ("masked", True)):
            own = shape._replace(masked=masked)
            row[f"{kind}_break_even"] = break_even_length_at(
                own, DEFAULT_SELECTOR, rates, self_attention=True
            )
            for length in LENGTHS:
                found = forecast_at(
                    own._replace(q_len=length, kv_len=length), DEFAULT_SELECTOR, rates
                )
                row[f"{kind}_speedup_{length}"] = found.dense_seconds / found.sparse_seconds
        yield row


COLUMNS: dict[str, markdown.Format] = {
    **dict.fromkeys(("GPU", "heads", "sparse from", "sparse from, under a mask"), "{}"),
    **dict.fromkeys((f"at {length}" for length in LENGTHS), "{:.2f}x"),
    **dict.fromkeys((f"at {length}, under a mask" for length in LENGTHS), "{:.2f}x"),
}


def describe(result: Mapping[str, Any], name: str) -> str:
    """The table of the file."""
    kinds = ("free", "masked")
    rows = [
        [
            row["gpu"],
            row["heads"],
            *(row[f"{kind}_break_even"] or "never" for kind in kinds),
            *(row[f"{kind}_speedup_{length}"] for kind in kinds for length in LENGTHS),
        ]
        for row in result["rows"]
    ]
    title = f"{name}: PREDICTED, not measured; densities {result['densities']}"
    return markdown.page(*markdown.heading(title, result), markdown.table(COLUMNS, rows))


if __name__ == "__main__":
    main()
