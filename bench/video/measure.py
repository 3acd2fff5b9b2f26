"""Raster against tile order for the patches of real clips, with every selector that takes them.

python -m bench.video [--clips bikes,...] [--max-seconds 280] [--output FILE]

Attention is that of patch embeddings with fixed random weights (`bench/video/clips.py`), not of a
trained model: the clips are real, what attends to what is a stand-in. Each selector is judged at
several settings in each order, on the same rows: density, the share of dense attention in the kept
blocks (recall), and the relative error of the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import Selector, UniSparse
from unisparse_flex.selectors import (
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    PatchOrder,
    StreamingLLM,
    XAttention,
)

from ..calls import SETTINGS
from ..record import FOLDER, Record
from .clips import CLIPS, SHARPNESS, ClipAttention, cut_patches, effective_share, embed, load_clip

OUTPUT = FOLDER / "video-cpu.json"
WEIGHTS = (
    "fixed and random: patch embeddings of real clips, queries and keys one projection; no "
    "trained model"
)
# Nothing but the diagonal is forced: there is no first token that all attend to.
GUARDS: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "last_query_blocks": 0}
TOP_P = (0.3, 0.5, 0.75, 0.92, 0.98)
SWEEPS: dict[str, list[Selector]] = {
    "unisparse-paper": [UniSparse.paper(top_p=p, **GUARDS) for p in TOP_P],
    "unisparse-two": [UniSparse.paper(top_p=p, **SETTINGS["two"], **GUARDS) for p in TOP_P],
    "xattention": [XAttention(top_p=p, **GUARDS) for p in TOP_P],
    "flashprefill": [FlashPrefill(alpha=a, **GUARDS) for a in (0.7, 0.4, 0.15, 0.03, 1e-3)],
    "streamingllm": [StreamingLLM(sink_tokens=0, local_tokens=n) for n in (257, 641, 1281, 2049)],
    "flexprefill": [FlexPrefill()],
    "minference": [MInference()],
    "oracle": [Oracle(top_p=p) for p in (0.5, 0.75, 0.92)],
}
# Tile, and cell inside it, by the name of the order.
TILES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None] | None] = {
    "raster": None,
    "tile 2x8x8": ((2, 8, 8), None),
    "tile 2x8x8, cell 2x2x2": ((2, 8, 8), (2, 2, 2)),
    "tile 4x4x8, cell 2x2x2": ((4, 4, 8), (2, 2, 2)),
}
JUDGED_ROWS = 256


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.video", description=__doc__)
    parser.add_argument("--clips", default=",".join(CLIPS), help=f"of {','.join(CLIPS)}")
    parser.add_argument("--max-seconds", type=float, default=280.0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)

    names = options.clips.split(",")
    unknown = sorted(set(names) - set(CLIPS))
    if unknown:
        parser.error(f"--clips must be of {', '.join(CLIPS)}, got {', '.join(unknown)}")
    taken, refused = split_sweeps()
    record = Record.create(
        "bench.video",
        "cpu",
        options.output,
        options.max_seconds,
        weights=WEIGHTS,
        sharpness=SHARPNESS,
        judged_rows=JUDGED_ROWS,
        causal_only=refused,
        dtype="float32",
        clips={},
    )
    for name in names:
        clip = CLIPS[name]
        scene = Scene(embed(cut_patches(load_clip(clip), clip.patch)), JUDGED_ROWS)
        record.content["clips"][name] = scene.describe() | {
            "file": clip.file,
            "patch": clip.patch,
            "start": clip.start,
            "frames": clip.frames,
            "shrink": clip.shrink,
        }
        for order, judge in scene.orders().items():
            for selector_name, sweep in taken.items():
                for selector in sweep:
                    if record.stop_if_over():
                        return
                    row = {"clip": name, "order": order, "selector": selector_name}
                    record.add(row | {"parameters": repr(selector)} | judge(selector).row())
    record.write()


def split_sweeps() -> tuple[dict[str, list[Selector]], list[str]]:
    """The sweeps that are defined without causality, and the names of the others."""
    refused = [
        name
        for name, sweep in SWEEPS.items()
        if not all(s.supports(causal=False, masked=False, self_attention=True) for s in sweep)
    ]
    return {name: sweep for name, sweep in SWEEPS.items() if name not in refused}, refused


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judgement:
    """What a selection keeps, and what attention over it gives.

    Attributes:
        density: Kept blocks over all.
        recall: Share of dense attention in kept blocks, mean over heads and judged rows.
        output: [heads, rows, D], attention of the judged rows over kept blocks.
        relative_error: |output - dense| / |dense|.
    """

    density: float
    recall: float
    output: Tensor
    relative_error: float

    def row(self) -> dict[str, float]:
        """The figures of a record."""
        names = ("density", "recall", "relative_error")
        return {name: getattr(self, name) for name in names}


class Scene:
    """A clip's attention, dense for some rows, and what selections make of these."""

    def __init__(self, call: ClipAttention, judged_rows: int, seed: int = 0) -> None:
        self.call = call
        tokens = call.query.shape[2]
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(tokens, generator=generator)[:judged_rows]
        logits = call.query[0, :, self.rows] @ call.key[0].mT
        self.shares = [effective_share(head) for head in logits]
        self.weights = logits.softmax(-1)
        self.dense = self.weights @ call.value[0]

    def describe(self) -> dict[str, Any]:
        """Grid, tokens and how sharp each head is on the judged rows."""
        return {
            "grid": self.call.grid,
            "tokens": self.call.query.shape[2],
            "effective_keys": self.shares,
        }

    def orders(self) -> dict[str, Callable[[Selector], Judgement]]:
        """A judge for every order of `TILES`."""
        orders: dict[str, Callable[[Selector], Judgement]] = {}
        for name, tiles in TILES.items():
            tile, cell = tiles or (None, None)
            order = tile and PatchOrder(grid=self.call.grid, tile=tile, cell=cell)
            orders[name] = self.judge_in(order or None)
        return orders

    def judge_in(self, order: PatchOrder | None) -> Callable[[Selector], Judgement]:
        """What judges selectors that see the tokens in an order; raster order for ``None``."""
        query, key = self.call.query, self.call.key
        places = torch.arange(query.shape[2])
        if order is not None:
            query, key, places = order.permute(query), order.permute(key), order.inverse()

        def judge(selector: Selector) -> Judgement:
            selection = selector.select(query, key, scale=1.0)
            blocks = places // selector.block_size
            keep = selection.keep[0].expand(query.shape[1], -1, -1)
            kept = self.weights * keep[:, blocks[self.rows]][..., blocks]
            mass = kept.sum(-1, keepdim=True)
            output = (kept @ self.call.value[0]) / mass
            return Judgement(
                density=selection.density(),
                recall=float(mass.mean()),
                output=output,
                relative_error=float((output - self.dense).norm() / self.dense.norm()),
            )

        return judge
