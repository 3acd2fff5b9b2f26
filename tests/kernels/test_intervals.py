"""Under a mask of intervals the kernels select what the definition selects, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry, BlockSelection
from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.granularity import Sampled
from unisparse_flex.block_masks.key_intervals import IntervalTables, KeyIntervals, interval_tables
from unisparse_flex.block_masks.mask_summary import MaskSummary, summarize_mask
from unisparse_flex.block_masks.masks import MaskProgram, has_intervals
from unisparse_flex.block_masks.scoring import compute_mean_scores, default_scale
from unisparse_flex.block_masks.selection import per_query_head, select_blocks

from .calls import CPU, RULES, TOLERANCE, KernelCall, assert_same_lists, decided, kernel_calls, run
from .interpreter import Kernels


@dataclass(frozen=True, kw_only=True)
class MaskedCall:
    """A call, and a mask beside its causality.

    Attributes:
        call: Lengths, heads, selector.
        text: The mask, see `MaskProgram`.
        tensors: What it reads.
        device: Where its definition is computed.
    """

    call: KernelCall
    text: str
    tensors: tuple[Tensor, ...]
    device: torch.device = CPU

    @property
    def geometry(self) -> BlockGeometry:
        call = self.call
        program = MaskProgram.parse(
            self.text,
            tensors=self.tensors,
            batch=call.batch,
            q_len=call.q_len,
            kv_len=call.kv_len,
        )
        assert has_intervals(program.expr)
        return replace(call.geometry, mask=program)

    def pairs(self) -> Tensor:
        """The mask and causality, pair by pair: bool [1 or B, 1, Sq, Skv]."""
        geometry = self.geometry
        row = torch.arange(geometry.q_len, device=self.device)
        key = torch.arange(geometry.kv_len, device=self.device)
        assert geometry.mask is not None
        pairs = geometry.mask.pairs(row, key)
        if geometry.causal_offset is not None:
            pairs = pairs & (key[None, :] <= row[:, None] + geometry.causal_offset)
        return pairs

    def tables(self) -> IntervalTables:
        selector = self.call.selector
        return interval_tables(
            self.geometry,
            CPU,
            c_q=selector.c_q,
            c_k=selector.c_k,
            sampled_queries=selector.sampled_queries,
            sink_blocks=selector.sink_blocks,
            last_query_blocks=selector.last_query_blocks,
        )


def reference(masked: MaskedCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, MaskSummary]:
    """Scores [B, Hs, Nq, Nk] and kept blocks [B, Hq, Nq, Nk] by what pairs are visible."""
    call, selector, pairs = masked.call, masked.call.selector, masked.pairs()
    mask = summarize_mask(pairs, call.geometry, c_q=selector.c_q, c_k=selector.c_k)
    granularities: list[Any] = [selector.granularity]
    if selector.sampled_queries:
        granularities.append(Sampled(queries=selector.sampled_queries, heads=selector.c_h))
    scores = compute_mean_scores(
        query,
        key,
        geometry=call.geometry,
        granularities=granularities,
        scale=default_scale(query.shape[3]),
        attn_mask=pairs,
        mask=mask,
    )
    keep, visible = select_blocks(
        scores,
        rule=selector.rule,
        forced_blocks=selector.forced_blocks,
        geometry=call.geometry,
        mask=mask,
    )
    keep = per_query_head(keep, visible, call.q_heads)
    return scores, keep.expand(-1, call.q_heads, -1, -1), mask


def assert_selects(masked: MaskedCall, lists: BlockLists, query: Tensor, key: Tensor) -> int:
    """Asserts that the lists are those of `reference`, but for what rounding decides."""
    call = masked.call
    exact, _, mask = reference(masked, query.double(), key.double())
    _, keep, _ = reference(masked, query, key)
    found = lists.kept()
    differs = found != keep
    if differs.any():
        scores = exact.repeat_interleave(call.selector.c_h, dim=1)
        kept, dropped = decided(call, scores, TOLERANCE[call.dtype], mask)
        # A row that would leave a query without keys keeps all that it sees.
        whole = (keep == mask.visible_blocks).all(-1, keepdim=True)
        whole |= (found == mask.visible_blocks).all(-1, keepdim=True)
        assert not (differs & (kept | (dropped & ~whole))).any()
    selection = BlockSelection(keep=found, visible=mask.visible_blocks, geometry=masked.geometry)
    assert_same_lists(lists, BlockLists(*selection.block_lists()))
    return int(differs.sum())


def runs(batch: int, length: int, share: float, generator: torch.Generator) -> Tensor:
    """Ids [batch, length] that stay for 1 / share tokens and then never return."""
    return (torch.rand((batch, length), generator=generator) < share).cumsum(-1)


@st.composite
def masked_calls(draw: st.DrawFn, *, rule: str) -> MaskedCall:
    """Padding on either side or anywhere, windows, chunks, documents, prefixes, images."""
    call = draw(kernel_calls(rule=rule))
    generator = call.generator()
    batch, q_len, kv_len = call.batch, call.q_len, call.kv_len
    parts: list[str] = []
    tensors: list[Tensor] = []
    offset = call.offset or 0
    kinds = (
        *("left", "right", "holes", "window", "chunk", "rows", "ends", "short"),
        *("documents", "prefix", "images"),
    )
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True)):
        at = len(tensors)
        key = torch.arange(kv_len)
        edges = torch.randint(0, kv_len + 1, (batch, 1), generator=generator)
        if kind == "left":
            parts.append(f"t{at}[b, kv]")
            tensors.append(key >= edges)
        elif kind == "right":
            parts.append(f"t{at}[b, kv]")
            tensors.append(key < edges)
        elif kind == "holes":
            parts.append(f"t{at}[kv]")
            tensors.append(torch.rand(kv_len, generator=generator) < 0.6)
        elif kind == "rows":
            parts.append(f"t{at}[b, q]")
            tensors.append(torch.rand((batch, q_len), generator=generator) < 0.7)
        elif kind == "ends":
            parts.append(f"kv < t{at}[b, 0]")
            tensors.append(edges)
        elif kind == "short":
            parts.append(f"q < t{at}[b, 0]")
            tensors.append(torch.randint(0, q_len + 1, (batch, 1), generator=generator))
        elif kind == "window":
            width = draw(st.integers(1, 40))
            parts.append(f"{offset - width} < kv - q")
        elif kind == "documents":
            parts.append(f"t{at}[b, q + {offset}] == t{at}[b, kv]")
            tensors.append(runs(batch, q_len + offset + kv_len, 0.1, generator))
        elif kind == "prefix":
            parts.append(f"(kv <= q + {offset}) | (kv < t{at}[b, 0])")
            tensors.append(edges)
        elif kind == "images":
            ids = runs(batch, q_len + offset + kv_len, 0.2, generator)
            parts.append(
                f"(kv <= q + {offset}) | ((t{at}[b, q + {offset}] == t{at}[b, kv])"
                f" & (0 <= t{at}[b, kv]))"
            )
            tensors.append(ids.masked_fill(ids % 3 > 0, -1))
        else:
            size = draw(st.integers(3, 40))
            parts.append(f"t{at}[q] <= kv")
            tensors.append(torch.arange(q_len) // size * size)
    text = " & ".join(f"({part})" for part in parts)
    return MaskedCall(call=call, text=text, tensors=tuple(tensors))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=6)
@given(data=st.data())
def test_the_lists_are_those_of_the_pairs(kernels: Kernels, rule: str, data: st.DataObject) -> None:
    masked = data.draw(masked_calls(rule=rule))
    query, key = masked.call.query_key()
    lists = run(kernels, masked.call, query, key, intervals=masked.tables())
    assert_selects(masked, lists, query, key)


@settings(max_examples=40)
@given(data=st.data())
def test_intervals_say_which_pairs_are_visible(data: st.DataObject) -> None:
    masked = data.draw(masked_calls(rule="top_k"))
    found = KeyIntervals.of(masked.geometry, CPU)
    key = torch.arange(masked.call.kv_len)
    inside = (key >= found.first[..., None]) & (key <= found.last[..., None])
    seen = (inside & found.key_valid[:, None])[:, None]
    assert seen.equal(masked.pairs().expand_as(seen))
    assert found.gaps is None or not found.gaps.any()
    assert found.sees.equal(seen[:, 0].any(-1))


@settings(max_examples=6)
@given(data=st.data())
def test_rows_of_documents_in_pieces_keep_what_they_see(
    kernels: Kernels, data: st.DataObject
) -> None:
    call = data.draw(kernel_calls(rule="top_k"))
    generator = call.generator()
    offset = call.offset or 0
    ids = torch.randint(0, 3, (call.batch, call.kv_len + call.q_len + offset), generator=generator)
    text = f"t0[b, q + {offset}] == t0[b, kv]"
    masked = MaskedCall(call=call, text=text, tensors=(ids,))
    lists = run(kernels, call, *call.query_key(), intervals=masked.tables())
    pairs, size = masked.pairs(), call.selector.block_size
    gaps = KeyIntervals.of(masked.geometry, CPU).gaps
    assert gaps is not None
    gaps = F.pad(gaps, (0, -call.q_len % size)).unflatten(1, (-1, size)).any(-1)
    kept = lists.kept()
    assert not (tiled(pairs, size) & gaps[:, None, :, None] & ~kept).any()
    nothing = torch.zeros_like(lists.kv_num_blocks)
    full = BlockLists(nothing, *lists.tensors()[1:]).kept()
    assert not (tiled(~pairs, size) & full).any()


def tiled(pairs: Tensor, size: int) -> Tensor:
    """Whether blocks hold a pair: bool [..., Sq, Skv] as [..., Nq, Nk]."""
    pairs = F.pad(pairs, (0, -pairs.shape[-1] % size, 0, -pairs.shape[-2] % size))
    return pairs.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).any(-1).any(-2)
