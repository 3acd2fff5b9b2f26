"""What a generated token takes with a cache that is read in part.

python -m bench.generation [--lengths 4096,8192]
python -m bench.generation --device cuda [--layers 4] [--shapes 1x131072,...] [--limit N]

On a GPU it is what `generation_gpu` says. On a CPU it is SmolLM2 with real weights: the prompt is
prefilled once, dense; its keys and values are put into every cache. Tokens are the likeliest ones
of each cache's own run, one thread, seconds that the process computed; caches take turns, token by
token.
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
from unisparse_flex.integrations.transformers_names import cache_name
from unisparse_flex.passes.decision import device_name

from . import generation_gpu, markdown
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
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS, help="in tokens, on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=generation_gpu.LAYERS, help="on a GPU")
    parser.add_argument(
        "--shapes", type=shapes, default=generation_gpu.SHAPES, help="sequences x tokens, on a GPU"
    )
    parser.add_argument("--limit", type=float, default=math.inf, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/generation-<device>.json")
    options = parser.parse_args(arguments)
    name = device_name(options.device).replace(" ", "-")
    options.output = options.output or FOLDER / f"generation-{name}.json"
    if options.device == "cuda":
        measure_gpu(options)
        return
    torch.set_num_threads(1)
    loaded = load_smollm2(device=torch.device("cpu"))
    record = Record.create(
        "bench.generation",
        "cpu",
        options.output,
        options.limit,
        model=MODEL_NAME,
        weights="real",
        text=TEXT,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    with record.stopping():
        record.collect(measure(loaded, options.lengths, TOKENS))


def measure_gpu(options: argparse.Namespace) -> None:
    """What `main` does on a GPU."""
    model = generation_gpu.create_model(options.layers, "cuda", small=False)
    record = Record.create(
        "bench.generation",
        "cuda",
        options.output,
        options.limit,
        model=f"the shape of Llama-3.1-8B, {options.layers} layers",
        weights="random",
        compiled=True,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    with record.stopping():
        record.collect(generation_gpu.measure(model, options.shapes))


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Reads ``1x131072,16x32768``."""
    pairs = [part.split("x") for part in text.split(",") if part]
    return tuple((int(batch), int(length)) for batch, length in pairs)


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
    logits = model(ids, **{cache_name(): first}, use_cache=True, logits_to_keep=1).logits
    caches: dict[str, Any] = {"static": StaticCache(model.config, max_cache_len=longest)}
    for selector in SELECTORS:
        caches[selector.text] = SparseStaticCache(model.config, longest, selector)
    for cache in caches.values():
        for index, layer in enumerate(first.layers):
            cache.update(layer.keys, layer.values, index)
    return {"dynamic": first, **caches}, logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def _next(model: Any, token: Tensor, cache: Any) -> Tensor:
    logits = model(token, **{cache_name(): cache}, use_cache=True).logits
    following: Tensor = logits[:, -1].argmax(-1, keepdim=True)
    return following


def describe(result: Mapping[str, Any], name: str) -> str:
    """What a token takes with each cache."""
    rows = [row for row in result["rows"] if "ms" in row]
    on_gpu = any("batch" in row for row in rows)
    density = "densities free but for a share" if result["weights"] == "real" else "densities given"
    compiled = "compiled by generate" if result.get("compiled") else "uncompiled"
    title = (
        f"{name}: {result['model']}, {result['weights']} weights, {density}, {compiled}, "
        f"{result['dtype']}, {result['device']}"
    )
    columns: dict[str, markdown.Format] = {
        **({"sequences": "{}"} if on_gpu else {}),
        "tokens": "{}",
        "cache": "{}",
        "keys read": markdown.percent,
        "a token, ms": "{:.2f}" if on_gpu else "{:.0f}",
        **({"tokens a second": "{:.0f}"} if on_gpu else {}),
        "static / this": "{:.2f}",
    }
    static = {shape_of(r): median(r["ms"]) for r in rows if r["cache"] == "static"}
    lines = []
    for row in rows:
        ms, dense = median(row["ms"]), static.get(shape_of(row))
        cells: list[Any] = [row["tokens"], f"`{row['cache']}`", row["density"], ms]
        if on_gpu:
            cells = [row["batch"], *cells, row["tokens_per_second"]]
        lines.append([*cells, None if dense is None else dense / ms])
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


def shape_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Sequences of a row, and tokens of each."""
    return row.get("batch", 1), row["tokens"]


if __name__ == "__main__":
    main()
