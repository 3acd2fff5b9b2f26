"""A real model whose attention reads the blocks of a choice, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex.block_masks.selection import TopP
from unisparse_flex.block_masks.selectors import default_top_p
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import orders
from .choices import Choice
from .parts import BLOCK, Call, Part, Tile

IMPLEMENTATION = "choice"


@dataclass(kw_only=True)
class Chooser:
    """What the attention of a model does: dense without a choice.

    Attributes:
        choice: How blocks are chosen.
        threshold: As in the library's default.
        densities: Kept over visible blocks, of every call.
        rows: What scoring cost, of every part.
        sorted_heads: Share of key heads that were sorted, of calls where that was decided.
        layer: Calls so far.
        anchors: Scores of the parts of the last layer that scored for others.
    """

    choice: Choice | None = None
    threshold: float = 0.0
    densities: list[Tensor] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    sorted_heads: list[Tensor] = field(default_factory=list)
    layer: int = 0
    anchors: list[Tensor] = field(default_factory=list)

    @contextmanager
    def set(self, choice: Choice, threshold: float) -> Iterator[None]:
        """Attention reads this choice inside."""
        self.choice, self.threshold = choice, threshold
        self.densities, self.rows, self.layer, self.anchors = [], [], 0, []
        self.sorted_heads = []
        try:
            yield
        finally:
            self.choice = None

    def attend(self, call: Call) -> Tensor:
        """Output [Hkv, G, S, D]."""
        choice = self.choice
        assert choice is not None
        call, tile = replace(call, tile=choice.tile), choice.tile
        sort = None
        if choice.order is not None and self.layer < (choice.sorted_layers or self.layer + 1):
            sort = sort_keys(call, choice)
        if sort is not None and choice.sorted_share:
            natural = torch.arange(call.tokens, device=sort.device).expand_as(sort)
            usual, found = (self._count_last(call, choice, order) for order in (natural, sort))
            pays = found < choice.sorted_share * usual
            self.sorted_heads.append(pays.float().mean())
            sort = torch.where(pays[:, None], sort, natural)
        kept, visible = torch.zeros(2, device=call.key.device)
        outputs = []
        for place, first in enumerate(range(0, call.tokens, choice.segment)):
            split = 0 if sort is None else max(0, first - choice.lag * choice.segment)
            key, value, sink = _seen(call, sort, first, choice.segment, split)
            last = key.shape[1]
            query = call.query[:, :, first:last]
            part = Part(query=query, key=key, first=first, scale=call.scale, tile=choice.tile)
            is_last = last == call.tokens
            keep = self._keep(choice, part, place, sink, is_last=is_last)
            rows = None
            if choice.sorts_rows and split:
                rows = orders.sort_rows(query, key[:, :split], tile.rows)
                keep[..., : split // tile.keys] = self._keep_sorted(choice, part, rows, sink, split)
            kept = kept + keep.sum() * tile.part
            if rows is not None and is_last:
                # The last block of rows is read apart, whole; the others are sorted.
                far = keep[..., : split // tile.keys]
                last_rows = BLOCK // tile.rows * far[:, :, 0].numel()
                drawn = far.sum() * BLOCK / part.rows
                kept = kept + (last_rows - drawn) * tile.part
            visible = (
                visible + replace(part, tile=Tile()).visible.sum() * keep.shape[0] * keep.shape[1]
            )
            outputs.append(_attend_blocks(part, value, keep, rows, split, is_last=is_last))
        self.densities.append(kept / visible)
        self.layer += 1
        return torch.cat(outputs, 2)

    def _count_last(self, call: Call, choice: Choice, sort: Tensor) -> Tensor:
        """Blocks that the last rows keep in an order, [Hkv]."""
        first = call.tokens - choice.segment
        split = max(0, first - choice.lag * choice.segment)
        key, _, sink = _seen(call, sort, first, choice.segment, split)
        query = call.query[:, :, first:]
        part = Part(query=query, key=key, first=first, scale=call.scale, tile=choice.tile)
        self.rows, before = [], self.rows
        keep = self._keep(choice, part, 0, sink, is_last=False)
        self.rows = before
        return keep.sum((1, 2, 3))

    def _keep(
        self, choice: Choice, part: Part, place: int, sink: Tensor, *, is_last: bool
    ) -> Tensor:
        """Kept blocks, bool [Hkv, G, Nq, Nk]."""
        visible, size = part.visible, choice.tile.keys
        least = self._threshold(visible.sum(-1, keepdim=True), size)
        scores, rows = choice.score(part, least)
        if choice.anchor > 1:
            rows /= choice.anchor
            if self.layer % choice.anchor == 0:
                self.anchors[place:] = [scores]
            else:
                scores = _match_heads(scores, self.anchors[place])
        self.rows.append(rows)
        blocks = torch.arange(part.key_blocks, device=visible.device)
        start = torch.arange(part.row_blocks, device=visible.device) * choice.tile.rows
        own = ((blocks + 1) * size > part.first + start[:, None]) & visible
        forced = own | (blocks == sink[:, None, None, None])
        if is_last:
            forced[:, :, -BLOCK // choice.tile.rows :] = True
        return self._apply(scores, forced, visible, least)

    def _keep_sorted(
        self, choice: Choice, part: Part, rows: Tensor, sink: Tensor, split: int
    ) -> Tensor:
        """Kept blocks before ``split`` of sorted rows, bool [Hkv, G, Nq, split / keys].

        What is not before it counts as one block that is kept.
        """
        query = _take(part.query, rows)
        sorted_part = replace(part, query=query, sorted_rows=rows)
        count = split // part.tile.keys
        least = self._threshold(torch.tensor(part.key_blocks), part.tile.keys)
        scores, _ = choice.score(sorted_part, least)
        near = scores[..., count:].sum(-1, keepdim=True)
        scores = torch.cat([scores[..., :count], near], -1)
        blocks = torch.arange(count + 1, device=scores.device)
        forced = (blocks == sink[:, None, None, None]) | (blocks == count)
        return self._apply(scores, forced, torch.ones_like(blocks, dtype=torch.bool), least)[
            ..., :count
        ]

    def _threshold(self, blocks: Tensor, size: int) -> Tensor:
        """What a score of ``size`` keys must reach, for rows that see so many such blocks."""
        usual = blocks * size / BLOCK
        stated = DEFAULT_SELECTOR.threshold_blocks or 0
        return self.threshold * (stated / usual).sqrt() * size / BLOCK

    def _apply(self, scores: Tensor, forced: Tensor, visible: Tensor, least: Tensor) -> Tensor:
        """The default's rule."""
        kept = TopP(top_p=default_top_p(self.threshold)).select(scores, forced, visible)
        return kept | ((scores >= least) & visible)


def sort_keys(call: Call, choice: Choice) -> Tensor:
    """Positions of keys in the choice's order, int64 [Hkv, whole segments]."""
    assert choice.order is not None
    found = choice.order.order(call, choice.segment, choice.lag)
    if choice.natural_in_blocks:
        found = found.unflatten(1, (-1, choice.tile.keys)).sort(-1).values.flatten(1)
    return found


def _seen(
    call: Call, sort: Tensor | None, first: int, rows: int, split: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the part that begins at ``first``, and the block of the first key."""
    last = min(first + rows, call.tokens)
    sink = torch.zeros(call.key.shape[0], dtype=torch.int64, device=call.key.device)
    if sort is None or split == 0:
        return call.key[:, :last], call.value[:, :last], sink
    index = sort[:, :split, None].expand(-1, -1, call.key.shape[2])
    key, value = (
        torch.cat([tokens.gather(1, index), tokens[:, split:last]], 1)
        for tokens in (call.key, call.value)
    )
    return key, value, (sort[:, :split] == 0).int().argmax(1) // call.tile.keys


def _attend_blocks(
    part: Part, value: Tensor, keep: Tensor, rows: Tensor | None, split: int, *, is_last: bool
) -> Tensor:
    """Attention of a part's rows over the kept blocks: [Hkv, G, R, D].

    With ``rows``, blocks before ``split`` are those of rows in that order.
    """
    heads, group = part.query.shape[:2]
    # What is added to logits; made once for a block, as memory is what this takes.
    bias = torch.zeros_like(keep, dtype=part.query.dtype).masked_fill_(~keep, -math.inf)
    count, blocks = keep.shape[2:]
    tile = (heads, group, count, part.tile.rows, blocks, part.tile.keys)
    bias = bias[:, :, :, None, :, None].expand(tile).reshape(heads, group, part.rows, -1)
    if rows is not None:
        index = rows.argsort(-1)
        bias[..., :split] = _take(bias[..., :split], index)
        if is_last:
            bias[:, :, -BLOCK:, :split] = 0.0
    later = torch.ones(part.rows, part.rows, dtype=torch.bool, device=bias.device).triu(1)
    bias[..., part.first :].masked_fill_(later, -math.inf)
    key, value = (tokens.repeat_interleave(group, 0) for tokens in (part.key, value))
    found = F.scaled_dot_product_attention(
        part.query.flatten(0, 1)[None],
        key[None],
        value[None],
        attn_mask=bias.flatten(0, 1)[None],
        scale=part.scale,
    )
    return found[0].unflatten(0, (heads, group))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """[Hkv, G, R, n] in the order of ``index``, [Hkv, G, R]."""
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[-1]))


def _match_heads(own: Tensor, anchor: Tensor) -> Tensor:
    """The anchor's scores of the head that is most like each of these."""
    mine, theirs = own.flatten(0, 1).flatten(1), anchor.flatten(0, 1).flatten(1)
    common = torch.stack([torch.minimum(mine, other).sum(-1) for other in theirs], -1)
    return anchor.flatten(0, 1)[common.argmax(-1)].view_as(own)


def attend_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """Causal attention over the last ``window`` keys: [1, Hq, S, D] of [1, Hq or Hkv, S, D]."""
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    if tokens <= window or tokens % window:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < window)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=group > 1
        )
    chunks = tokens // window
    queries = query[0].unflatten(1, (chunks, window)).transpose(0, 1)

    def two(tokens: Tensor) -> Tensor:
        split = tokens[0].unflatten(1, (chunks, window)).transpose(0, 1)
        before = torch.cat([torch.zeros_like(split[:1]), split[:-1]])
        return torch.cat([before, split], 2).repeat_interleave(group, 1)

    row = torch.arange(window, device=query.device)[:, None] + window
    column = torch.arange(2 * window, device=query.device)
    mask = ((column <= row) & (column > row - window)).repeat(chunks, 1, 1, 1)
    mask[0, :, :, :window] = False
    found = F.scaled_dot_product_attention(
        queries, two(key), two(value), attn_mask=mask, scale=scale
    )
    return found.transpose(0, 1).flatten(1, 2)[None]


def load(weights: Path, chooser: Chooser, device: torch.device) -> Any:
    """The model of a GGUF file, its attention by ``chooser``; sliding windows stay as they are."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        scale, window = more["scaling"], more.get("sliding_window")
        if window is not None:
            found = attend_window(query, key, value, scale, window)
        elif chooser.choice is None:
            found = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            queries = query[0].unflatten(0, (key.shape[1], -1))
            call = Call(query=queries, key=key[0], value=value[0], scale=scale)
            found = chooser.attend(call).flatten(0, 1)[None]
        return found.transpose(1, 2).contiguous(), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
    )
    model.set_attn_implementation(IMPLEMENTATION)
    return model.to(device, dtype).eval()
