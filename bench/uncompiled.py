"""What an optimized model takes uncompiled on a CPU, beside the dense one: SmolLM2, real weights.

python -m bench.uncompiled

Blocks are selected and applied as a mask inside dense attention there, so that it is slower than
dense. One thread; seconds that the process computed, whatever else runs. A prefill without a
cache, logits of the last token alone; the two take turns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import optimize, restore
from unisparse_flex.clock import in_turn
from unisparse_flex.evaluation import MODEL_NAME, LoadedModel, TextName, load_smollm2
from unisparse_flex.passes import observe_calls
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import markdown
from .excerpts import encode_excerpt
from .record import FOLDER, Record, numbers

LENGTHS = (1024, 2048, 4096)
TEXT: TextName = "prose"
REPEATS = 1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.uncompiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS, help="in tokens")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=FOLDER / "uncompiled-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_smollm2(device=torch.device("cpu"))
    record = Record.create(
        "bench.uncompiled",
        "cpu",
        options.output,
        math.inf,
        model=MODEL_NAME,
        weights="real",
        text=TEXT,
        dtype=str(loaded.dtype).removeprefix("torch."),
        selector=repr(DEFAULT_SELECTOR),
        repeats=options.repeats,
    )
    with record.stopping():
        record.collect(measure(loaded, options.lengths, options.repeats))


def measure(loaded: LoadedModel, lengths: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each length, after the shortest has warmed up."""
    for length in sorted(lengths):
        ids = encode_excerpt(loaded, TEXT, tokens=length, seed=0)
        densities: list[float] = []

        def dense(ids: Tensor = ids) -> float:
            restore(loaded.model)
            return _seconds(lambda: _prefill(loaded.model, ids))

        def sparse(ids: Tensor = ids, densities: list[float] = densities) -> float:
            optimize(loaded.model, DEFAULT_SELECTOR, min_length=0)
            kept: list[Any] = []
            with observe_calls(lambda call, config, selection, reason: kept.append(selection)):
                seconds = _seconds(lambda: _prefill(loaded.model, ids))
            densities[:] = [found.density() for found in kept if found is not None]
            return seconds

        if length == min(lengths):
            dense()
            sparse()
        times = in_turn([dense, sparse], repeats=repeats)
        restore(loaded.model)
        dense_ms, sparse_ms = (1e3 * median(each) for each in times)
        yield {
            "tokens": length,
            "sparse_calls": len(densities),
            "density": mean(densities),
            "dense_ms": dense_ms,
            "sparse_ms": sparse_ms,
            "times_ms": [[1e3 * seconds for seconds in each] for each in times],
        }


def _seconds(run: Callable[[], Any]) -> float:
    """Seconds that the process computed."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def _prefill(model: Any, ids: Tensor) -> None:
    model(ids, use_cache=False, logits_to_keep=1)


def describe(result: Mapping[str, Any], name: str) -> str:
    """How much longer each prompt takes."""
    title = (
        f"{name}: {result['model']}, {result['weights']} weights, densities free, default "
        f"settings, uncompiled, {result['dtype']}, {result['device']}"
    )
    columns: dict[str, markdown.Format] = {
        "tokens": "{}",
        "density": "{:.3f}",
        "dense, s": "{:.1f}",
        "sparse, s": "{:.1f}",
        "as long as dense": "{:.1f}x",
    }
    lines = [
        [
            row["tokens"],
            row["density"],
            row["dense_ms"] / 1e3,
            row["sparse_ms"] / 1e3,
            row["sparse_ms"] / row["dense_ms"],
        ]
        for row in result["rows"]
    ]
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


if __name__ == "__main__":
    main()
