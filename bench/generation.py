"""What a generated token takes on a CPU with a cache that is read in part: SmolLM2, real weights.

python -m bench.generation [--lengths 4096,8192]

The prompt is prefilled once, dense; its keys and values are put into every cache. Tokens are the
likeliest ones of each cache's own run, one thread, seconds that the process computed; caches take
turns, token by token.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import DecodeSelector
from unisparse_flex.evaluation import MODEL_NAME, LoadedModel, TextName, load_smollm2
from unisparse_flex.integrations.transformers import register

from . import markdown
from .excerpts import encode_excerpt
from .record import FOLDER, Record, numbers

LENGTHS = (4096, 8128)
TEXT: TextName = "prose"
TOKENS, UNTIMED = 24, 4
SELECTORS = (
    DecodeSelector(share=0.1),
    DecodeSelector(top_p=0.9),
    DecodeSelector(top_p=0.98),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS, help="in tokens")
    parser.add_argument("--output", type=Path, default=FOLDER / "generation-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_smollm2(device=torch.device("cpu"))
    record = Record.create(
        "bench.generation",
        "cpu",
        options.output,
        math.inf,
        model=MODEL_NAME,
        weights="real",
        text=TEXT,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    with record.stopping():
        record.collect(measure(loaded, options.lengths, TOKENS))


def measure(loaded: LoadedModel, lengths: Sequence[int], tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each length and cache."""
    register("unisparse")
    for length in lengths:
        ids = encode_excerpt(loaded, TEXT, tokens=length, seed=0)
        caches, last = create_caches(loaded.model, ids, length + tokens)
        times: dict[str, list[float]] = {name: [] for name in caches}
        following = dict.fromkeys(caches, last)
        for _ in range(tokens):
            for name, cache in caches.items():
                implementation = "unisparse" if name.startswith("Decode") else "sdpa"
                loaded.model.set_attn_implementation(implementation)
                start = time.process_time()
                following[name] = _next(loaded.model, following[name], cache)
                times[name].append(time.process_time() - start)
        for name, cache in caches.items():
            yield {
                "tokens": length,
                "cache": name,
                "density": getattr(cache, "density", None),
                "ms": sorted(1e3 * seconds for seconds in times[name][UNTIMED:]),
            }


@torch.inference_mode()
def create_caches(model: Any, ids: Tensor, longest: int) -> tuple[dict[str, Any], Tensor]:
    """The caches with the prompt's keys and values, and the token that follows."""
    from transformers import DynamicCache, StaticCache

    from unisparse_flex.integrations.transformers_decode import SparseStaticCache

    model.set_attn_implementation("sdpa")
    first = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=first, use_cache=True, logits_to_keep=1).logits
    caches: dict[str, Any] = {"static": StaticCache(model.config, max_cache_len=longest)}
    for selector in SELECTORS:
        caches[selector.text] = SparseStaticCache(model.config, longest, selector)
    for cache in caches.values():
        for index, layer in enumerate(first.layers):
            cache.update(layer.keys, layer.values, index)
    return {"dynamic": first, **caches}, logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def _next(model: Any, token: Tensor, cache: Any) -> Tensor:
    logits = model(token, past_key_values=cache, use_cache=True).logits
    following: Tensor = logits[:, -1].argmax(-1, keepdim=True)
    return following


def describe(result: Mapping[str, Any], name: str) -> str:
    """What a token takes with each cache."""
    title = (
        f"{name}: {result['model']}, {result['weights']} weights, densities free but for a share, "
        f"uncompiled, {result['dtype']}, {result['device']}"
    )
    columns: dict[str, markdown.Format] = {
        "tokens": "{}",
        "cache": "{}",
        "keys read": markdown.percent,
        "a token, ms": "{:.0f}",
        "static / this": "{:.2f}",
    }
    static = {r["tokens"]: median(r["ms"]) for r in result["rows"] if r["cache"] == "static"}
    lines = [
        [
            row["tokens"],
            f"`{row['cache']}`",
            row["density"],
            median(row["ms"]),
            static[row["tokens"]] / median(row["ms"]),
        ]
        for row in result["rows"]
    ]
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


if __name__ == "__main__":
    main()
