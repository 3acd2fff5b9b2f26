"""Calls small enough for Triton's interpreter, and which of their blocks rounding may decide.

Symbols: B batch, Hq/Hkv heads, Nq/Nk query and key blocks, S tokens, D head_dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.block_masks.strategies import Call, lengths, offsets
from unisparse_flex.block_masks import BlockSelection, UniSparse, compute_block_scores
from unisparse_flex.block_masks import kernels as selection_kernels
from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.granularity import Sampled
from unisparse_flex.block_masks.kernels import settings_of
from unisparse_flex.block_masks.key_intervals import IntervalTables
from unisparse_flex.block_masks.mask_summary import MaskSummary
from unisparse_flex.block_masks.scoring import compute_sampled_scores, default_scale
from unisparse_flex.block_masks.selection import scale_threshold

from .interpreter import Kernels

CPU = torch.device("cpu")
# Relative error of a score that may decide: more than twice the least that explains every
# difference on 32 calls of 150 queries (0.0033 and 0.0039; in float32 nothing differed).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.008, torch.bfloat16: 0.01}


@dataclass(frozen=True, kw_only=True)
class KernelCall(Call):
    """One attention call in a dtype that the kernels take."""

    head_dim: int = 16
    dtype: torch.dtype = torch.float32

    def query_key(self) -> tuple[Tensor, Tensor]:
        """Query [B, Hq, Sq, D] and key [B, Hkv, Skv, D] whose pooled logits vary."""
        generator = self.generator()

        def tokens(heads: int, length: int) -> Tensor:
            def noise(count: int) -> Tensor:
                shape = (self.batch, heads, count, self.head_dim)
                return torch.randn(shape, generator=generator)

            drift = noise(-(-length // 8)).repeat_interleave(8, dim=2)[:, :, :length]
            return (noise(length) + drift).to(self.dtype)

        return tokens(self.q_heads, self.q_len), tokens(self.kv_heads, self.kv_len)


def widen(
    call: KernelCall, deviation: float, group: int = 4, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Query and key whose logits deviate so much, alike in every ``group`` tokens.

    Alike, so that means of them are exact in every dtype. Keys of ``block`` have by far the
    highest logits.
    """
    generator = call.generator()

    def tokens(heads: int, length: int) -> Tensor:
        shape = (call.batch, heads, -(-length // group), call.head_dim)
        drawn = torch.randn(shape, generator=generator)
        return drawn.repeat_interleave(group, dim=2)[:, :, :length]

    query, key = tokens(call.q_heads, call.q_len), tokens(call.kv_heads, call.kv_len)
    if block is not None:
        size = call.selector.block_size
        query[..., 0] = call.head_dim**0.5
        key[..., 0] = 0.0
        key[:, :, block * size : (block + 1) * size, 0] = 8.0
    return (query * deviation).to(call.dtype), key.to(call.dtype)


def tolerance_of(call: KernelCall, query: Tensor, key: Tensor) -> float:
    """Relative error of a score by float32 logits of this size, and by the dtype's rounding."""
    longest = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()
    logit = float(longest) / call.head_dim**0.5
    return TOLERANCE[call.dtype] + 4 * logit * torch.finfo(torch.float32).eps


def pool(
    kernels: Kernels, tokens: Tensor, *, kv_heads: int, block_size: int, **side: Any
) -> tuple[Any, Any]:
    """Means of tokens, and picked ones, interpreted."""
    given = kernels.pool.Side(tokens=tokens, **side)
    means, lasts, _ = kernels.pool.pool(given, kv_heads=kv_heads, block_size=block_size)
    return means, lasts


def run(
    kernels: Kernels,
    call: Call,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    are_composites: bool = False,
    intervals: IntervalTables | None = None,
) -> BlockLists:
    """The kernels' lists, interpreted."""
    return kernels.lists.compute_lists(
        query,
        key,
        settings_of(call.selector),
        geometry=call.geometry,
        scale=default_scale(query.shape[3]) if scale is None else scale,
        are_composites=are_composites,
        intervals=intervals,
        head_thresholds=head_thresholds_of(call),
    )


def head_thresholds_of(call: Call) -> Tensor | None:
    """Those of the query heads, where they have some of their own."""
    thresholds = call.selector.head_thresholds
    return None if thresholds is None else torch.tensor(thresholds)


def exact_scores(call: Call, query: Tensor, key: Tensor) -> Tensor:
    """The scores in float64: [B, Hq, Nq, Nk]."""
    selector = call.selector
    options: dict[str, Any] = {
        "geometry": call.geometry,
        "scale": default_scale(query.shape[3]),
    }
    tokens = query.double(), key.double()
    scores = compute_block_scores(*tokens, granularity=selector.granularity, **options)
    if selector.sampled_queries:
        sampled = Sampled(queries=selector.sampled_queries, heads=selector.c_h)
        scores = (scores + compute_sampled_scores(*tokens, granularity=sampled, **options)) / 2
    return scores.repeat_interleave(selector.c_h, dim=1)


def decided(
    call: Call, scores: Tensor, tolerance: float, mask: MaskSummary | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks kept, and blocks dropped, whatever scores within ``tolerance`` of these decide."""
    selector = call.selector
    visible = call.geometry.visible_blocks(scores.device)[None, None]
    forced = selector.forced_blocks.locate(call.geometry, scores.device, mask)
    if mask is not None:
        visible = visible & mask.visible_blocks
    forced = forced & visible
    candidates = visible & ~forced
    low, high = scores * (1 - tolerance), scores * (1 + tolerance)
    thresholds = selector.head_thresholds or (selector.threshold,)
    has_threshold = thresholds != (None,)
    if has_threshold:
        # Its root, too, is rounded.
        reached = scale_threshold(
            torch.tensor(thresholds, dtype=torch.float64, device=scores.device)[:, None, None],
            selector.threshold_blocks,
            visible,
        )
        reaching, missing = low >= reached, high < reached
    if has_threshold and selector.top_p is None:
        # A row of which nothing reaches it keeps its highest.
        peak = low.masked_fill(~candidates, -1.0).amax(-1, keepdim=True)
        none = ~(forced | (reaching & candidates)).any(-1, keepdim=True)
        kept, dropped = reaching, missing & ~(none & (high >= peak))
    else:
        weight = torch.ones_like(scores) if selector.top_k is not None else scores
        slack = 0.0 if selector.top_k is not None else tolerance
        wanted = selector.top_k if selector.top_k is not None else selector.top_p
        assert wanted is not None
        mass = (weight * forced).sum(-1, keepdim=True)
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        others = candidates[..., None, :] & ~itself
        # Of block j (before the last axis), the blocks i that may, and that must, come first.
        may = others & (high[..., None, :] >= low[..., :, None])
        must = others & (low[..., None, :] > high[..., :, None])
        most = mass + (weight[..., None, :] * may).sum(-1)
        least = mass + (weight[..., None, :] * must).sum(-1)
        kept = (most * (1 + slack) < wanted) | (selector.top_p == 1.0)
        dropped = (least * (1 - slack) >= wanted) & (selector.top_p != 1.0)
        if has_threshold:
            kept, dropped = kept | reaching, dropped & missing
    return forced | (kept & candidates), ~visible | (dropped & candidates)


def assert_selects(
    call: Call, lists: BlockLists, query: Tensor, key: Tensor, tolerance: float | None = None
) -> int:
    """Asserts that the lists are the reference's but for what rounding decides; counts that."""
    tolerance = TOLERANCE[query.dtype] if tolerance is None else tolerance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_kernels, "obstacle", lambda *_: "compared")
        reference = call.select(query, key).keep.expand(-1, call.q_heads, -1, -1)
    keep = lists.kept()
    assert_well_formed(call, lists)
    differs = keep != reference
    if differs.any():
        kept, dropped = decided(call, exact_scores(call, query, key), tolerance)
        assert not (differs & (kept | dropped)).any()
    return int(differs.sum())


def assert_well_formed(call: Call, lists: BlockLists) -> None:
    """Asserts that kept blocks are listed once, in order, as full where all pairs are visible."""
    for tensor in lists.tensors():
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
    keep = lists.kept()
    selection = BlockSelection(
        keep=keep, visible=call.geometry.visible_blocks(keep.device), geometry=call.geometry
    )
    assert_same_lists(lists, BlockLists(*selection.block_lists()))


def assert_same_lists(one: BlockLists, other: BlockLists) -> None:
    """Asserts that both list the same blocks in the same order."""
    for part in (0, 2):
        counts, indices = one.tensors()[part : part + 2]
        other_counts, other_indices = other.tensors()[part : part + 2]
        assert counts.equal(other_counts)
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        assert indices[listed].equal(other_indices[listed])
        # FlexAttention's kernels may read the first index of an empty list.
        first = indices[..., 0]
        assert ((first >= 0) & (first < indices.shape[-1])).all()


RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "top_p": tuple({"top_p": p} for p in (0.5, 0.9, 0.95, 1.0)),
    "top_k": tuple({"top_k": k} for k in (1, 2, 3)),
    "threshold": (
        *({"threshold": t} for t in (0.05, 0.2, 0.5)),
        *({"threshold": t, "threshold_blocks": 3} for t in (0.05, 0.2)),
    ),
    "top_p_or_threshold": (
        *(
            {"top_p": p, "threshold": t}
            for p, t in ((0.4, 0.1), (0.7, 0.3), (0.2, 0.05), (1.0, 0.5))
        ),
        *({"top_p": 0.3, "threshold": t, "threshold_blocks": 4} for t in (0.05, 0.2)),
    ),
    # Those of the heads are drawn.
    "head_thresholds": (
        {},
        {"threshold_blocks": 3},
        {"top_p": 0.4},
        {"top_p": 0.3, "threshold_blocks": 4},
    ),
}
HEADS = ((2, 1), (4, 2), (6, 2), (3, 1))


@st.composite
def kernel_calls(draw: st.DrawFn, *, rule: str) -> KernelCall:
    """Calls of up to three blocks of queries, ragged, causal at any offset or not at all."""
    q_heads, kv_heads = draw(st.sampled_from(HEADS))
    group = q_heads // kv_heads
    size = draw(st.sampled_from([16, 32]))
    causal = draw(st.booleans())
    q_len = draw(lengths(size, max_blocks=3))
    kv_len = draw(lengths(size, max_blocks=6))
    if causal:
        kv_len = q_len + draw(offsets(size))
    options: Any = draw(st.sampled_from(RULES[rule]))
    c_h = draw(st.sampled_from([1, group]))
    if rule == "head_thresholds":
        share = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.6)
        thresholds = draw(st.lists(share, min_size=q_heads, max_size=q_heads))
        options, c_h = {**options, "head_thresholds": tuple(thresholds)}, 1
    selector = UniSparse(
        block_size=size,
        c_q=draw(st.sampled_from([1, 2, 4, 8, 16])),
        c_k=draw(st.sampled_from([1, 2, 4, 8, 16])),
        c_h=c_h,
        sampled_queries=draw(st.sampled_from([0, 1, 2, 4])),
        sink_blocks=draw(st.integers(0, 2)),
        local_blocks=draw(st.integers(1, 2)),
        last_query_blocks=draw(st.sampled_from([0, 0, 1])),
        **options,
    )
    return KernelCall(
        batch=draw(st.sampled_from([1, 1, 2])),
        kv_heads=kv_heads,
        group=group,
        q_len=q_len,
        kv_len=kv_len,
        causal=causal,
        selector=selector,
        seed=draw(st.integers(0, 2**31)),
        head_dim=draw(st.sampled_from([16, 24])),
    )


CALL_FIELDS = {field.name for field in dataclasses.fields(KernelCall)}


def fixed_call(
    q_len: int, kv_len: int | None = None, *, causal: bool = True, **fields: Any
) -> KernelCall:
    """Two heads that share keys, in blocks of 16, without sinks and last query blocks."""
    plain: dict[str, Any] = {"block_size": 16, "c_q": 4, "c_k": 4, "sampled_queries": 0}
    own: dict[str, Any] = {"batch": 1, "kv_heads": 1, "group": 2, "seed": 7}
    own |= {name: fields.pop(name) for name in CALL_FIELDS & fields.keys()}
    return KernelCall(
        q_len=q_len,
        kv_len=q_len if kv_len is None else kv_len,
        causal=causal,
        selector=UniSparse(**{**plain, "sink_blocks": 0, "last_query_blocks": 0, **fields}),
        **own,
    )
