"""What left padding changes: KL to the dense model and density of prompts that are padded.

A padded prompt's rows are turned until its first token begins a block, as it does alone.

python -m bench.padding [--tokens N] [--paddings 0,33,64,127,500] [--seeds 0,1,2]
    [--output FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import optimize, restore
from unisparse_flex.evaluation import (
    MODEL_NAME,
    TEXT_NAMES,
    LoadedModel,
    compute_kl,
    compute_log_probs,
    load_smollm2,
)
from unisparse_flex.reports import record_attention
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import markdown
from .excerpts import encode_excerpt
from .record import FOLDER, Record, numbers

PADDINGS = (0, 33, 64, 127, 500)
# Last tokens of a prompt, whose predictions are compared.
JUDGED = 512
CHARACTERS_PER_TOKEN = 8  # as the committed file has it: the excerpt depends on it


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.padding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--paddings", type=numbers(int), default=PADDINGS)
    parser.add_argument("--seeds", type=numbers(int), default=(0, 1, 2))
    parser.add_argument("--output", type=Path, default=FOLDER / "padding-smollm2.json")
    options = parser.parse_args(arguments)
    loaded = load_smollm2()
    record = Record.create(
        "bench.padding",
        loaded.device.type,
        options.output,
        math.inf,
        model=MODEL_NAME,
        weights="real",
        tokens=options.tokens,
        judged=JUDGED,
        dtype=str(loaded.dtype).removeprefix("torch."),
        selector=repr(DEFAULT_SELECTOR),
    )
    with record.stopping():
        record.collect(measure(loaded, options.tokens, options.paddings, options.seeds))


def measure(
    loaded: LoadedModel, tokens: int, paddings: Sequence[int], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each text, seed and padding."""
    for text in TEXT_NAMES:
        for seed in seeds:
            ids = encode_excerpt(
                loaded,
                text,
                tokens=tokens,
                seed=seed,
                characters_per_token=CHARACTERS_PER_TOKEN,
            )
            restore(loaded.model)
            dense = read(loaded.model, ids, 0)
            optimize(loaded.model, DEFAULT_SELECTOR, min_length=0)
            for padding in paddings:
                with record_attention(loaded.model) as records:
                    sparse = read(loaded.model, ids, padding)
                yield {
                    "text": text,
                    "seed": seed,
                    "padding": padding,
                    "density": mean(record.density or 0.0 for record in records),
                    "kl": compute_kl(dense, sparse),
                }
    restore(loaded.model)


@torch.inference_mode()
def read(model: Any, ids: Tensor, padding: int) -> Tensor:
    """Log-probabilities [JUDGED, V] at the end of a prompt [1, S] with padding before it."""
    padded = torch.nn.functional.pad(ids, (padding, 0))
    valid = torch.nn.functional.pad(torch.ones_like(ids), (padding, 0))
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    output = model(
        padded,
        attention_mask=valid,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=JUDGED,
    )
    return compute_log_probs(output.logits[0])


def describe(result: Mapping[str, Any], name: str) -> str:
    """What each padding changes, over all prompts."""
    rows = result["rows"]
    title = (
        f"{name}: {result['model']}, {result['weights']} weights, {result['tokens']} tokens, the "
        f"last {result['judged']} of them judged, densities free, {result['dtype']}, "
        f"{result['device']}"
    )
    alone = {(row["text"], row["seed"]): row for row in rows if not row["padding"]}
    lines = []
    for padding in dict.fromkeys(row["padding"] for row in rows):
        found = [row for row in rows if row["padding"] == padding]
        more = [row["kl"] - alone[row["text"], row["seed"]]["kl"] for row in found]
        error = stdev(more) / math.sqrt(len(more)) if len(more) > 1 else None
        of_all = [mean(row[value] for row in found) for value in ("density", "kl")]
        lines.append([padding, *of_all, mean(more), error])
    columns: dict[str, markdown.Format] = {
        "padding": "{}",
        "density": "{:.3f}",
        "KL": "{:.4f}",
        "more than alone": "{:+.4f}",
        "standard error": "{:.4f}",
    }
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


if __name__ == "__main__":
    main()
