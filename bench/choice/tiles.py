"""Block-sparse attention by the sizes of its blocks: FlexAttention's Triton kernel on a GPU.

python -m bench.choice.tiles [--cases HEADS-KVHEADS-DIM:TOKENS,...:ROWSxKEYS,... ...]
    [--densities 0.15,0.3]

Blocks are kept at random, those on the diagonal always; every row block of a head keeps as many
for its length. Rows of the file have the density that was kept, over the pairs of causal attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unisparse_flex.selectors import DEFAULT_SELECTOR

from ..record import FOLDER, Record, guarded, numbers
from ..timing import STATISTIC, measure_in_graph
from .parts import BLOCK, Tile

CASES = (
    "32-8-128:8192,32768:128x128,128x64,128x32,64x64,64x32",
    "9-3-64:8192:128x128,128x64,128x32,64x64,64x32",
    "4-1-256:32768:128x128,128x64,64x64,64x32",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choice.tiles", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--densities", type=numbers(float), default=(0.15, 0.3))
    parser.add_argument("--turns", type=int, default=3, help="0: only compiles")
    parser.add_argument("--max-seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path, default=FOLDER / "choice-tiles-cuda-sm90.json")
    options = parser.parse_args(arguments)
    record = Record.create("bench.choice.tiles", "cuda", options.output, options.max_seconds)
    record.content |= {"benchmark": "choice", "part": "tiles", "statistic": STATISTIC}
    # Every shape and block size is compiled, by the same function.
    torch._dynamo.config.recompile_limit = 64
    with record.stopping():
        for case in options.cases:
            shape, lengths, tiles = case.split(":")
            heads = tuple(map(int, shape.split("-")))
            for tokens, density in product(map(int, lengths.split(",")), options.densities):
                if record.stop_if_over():
                    return
                for row in _time(heads, tokens, tiles.split(","), density, options.turns):
                    record.add(row)
        for case in options.cases if options.turns else ():
            shape, lengths, _ = case.split(":")
            heads = tuple(map(int, shape.split("-")))
            for tokens, size in product(map(int, lengths.split(",")), (128, 64)):
                if record.stop_if_over():
                    return
                record.add(_time_selection(heads, tokens, size))


def parse_tile(text: str) -> Tile:
    """``128x64``: rows and keys."""
    rows, keys = map(int, text.split("x"))
    return Tile(rows=rows, keys=keys)


@torch.compile(dynamic=False)
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, options: Any) -> Any:
    return flex_attention(
        query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options
    )


@torch.no_grad()
def _time(
    heads: tuple[int, ...], tokens: int, tiles: Sequence[str], density: float, turns: int
) -> list[dict[str, Any]]:
    """A row for every tile; they take turns."""
    q_heads, kv_heads, width = heads
    query, key, value = (
        torch.randn(1, count, tokens, width, device="cuda", dtype=torch.bfloat16)
        for count in (q_heads, kv_heads, kv_heads)
    )
    # What FlexAttention takes on Hopper by itself, as far as the blocks allow it.
    rows, keys = {64: (128, 128), 128: (128, 64), 256: (64, 32)}[width]
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": width, "length": tokens}
    found: list[dict[str, Any]] = []
    calls: list[Callable[[], Any] | None] = []
    seconds: list[list[float]] = []
    for text in tiles:
        tile = parse_tile(text)
        mask, kept = random_blocks(q_heads, tokens, tile, density)
        options = {"BLOCK_M": min(rows, tile.rows), "BLOCK_N": min(keys, tile.keys)}
        if tile.rows < rows:
            # Half the warps for half the rows.
            options["num_warps"] = 4
        row: dict[str, Any] = {
            "stage": "attend",
            **shape,
            "tile": text,
            "density": kept,
            "kernel": options,
        }
        call = partial(_attend, query, key, value, mask, options)
        compiled = guarded(row, "compile", call) is not None
        calls.append(call if compiled else None)
        seconds.append([])
        found.append(row)
    for _ in range(turns):
        for compiled_call, times in zip(calls, seconds, strict=True):
            if compiled_call is not None:
                times += measure_in_graph(compiled_call)
    for row, times in zip(found, seconds, strict=True):
        times.sort()
        if times:
            row |= {f"p{part}": times[len(times) * part // 100] for part in (20, 50, 80)}
    return found


@torch.no_grad()
def _time_selection(heads: tuple[int, ...], tokens: int, size: int) -> dict[str, Any]:
    """The library's selection with square blocks, four rows of 128 tokens exact."""
    q_heads, kv_heads, width = heads
    query, key = (
        torch.randn(1, count, tokens, width, device="cuda", dtype=torch.bfloat16)
        for count in (q_heads, kv_heads)
    )
    selector = replace(
        DEFAULT_SELECTOR, block_size=size, c_k=size, sampled_queries=4 * size // BLOCK
    )
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": width, "length": tokens}
    row: dict[str, Any] = {"stage": "select", **shape, "tile": f"{size}x{size}"}
    run = partial(measure_in_graph, partial(selector.select, query, key, is_causal=True))
    times = guarded(row, "select", run)
    if times:
        row |= {f"p{part}": times[len(times) * part // 100] for part in (20, 50, 80)}
    return row


def random_blocks(
    heads: int, tokens: int, tile: Tile, density: float, device: str = "cuda"
) -> tuple[BlockMask, float]:
    """A causal mask of random blocks, and the share of causal pairs' blocks of 128 it keeps."""
    rows, columns = tokens // tile.rows, tokens // tile.keys
    last = (torch.arange(rows, device=device) + 1) * tile.rows - 1
    start = torch.arange(columns, device=device) * tile.keys
    visible = start <= last[:, None]
    partial_blocks = visible & (start + tile.keys > last[:, None] - tile.rows + 1)
    full = visible & ~partial_blocks
    draw = torch.rand(1, heads, rows, columns, device=device)
    full = (draw < density) & full
    usual = tokens // 128 * (tokens // 128 + 1) / 2
    kept = (full.sum() / heads + partial_blocks.sum()) * tile.part / usual
    lists = [_lists(blocks) for blocks in (partial_blocks.expand_as(full), full)]

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q >= kv

    mask = BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=(tile.rows, tile.keys),
        mask_mod=causal,
        seq_lengths=(tokens, tokens),
    )
    return mask, float(kept)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of blocks, and the blocks of each row first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()


if __name__ == "__main__":
    main()
