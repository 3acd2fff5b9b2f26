"""Parts of a call's query rows, each selected for apart, keep what the whole call keeps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.api.models import qkv
from unisparse_flex import Selector, UniSparse
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.granularity import CompositeKeys
from unisparse_flex.block_masks.selectors import FlexPrefill, MInference, StreamingLLM
from unisparse_flex.selectors import FlashPrefill, Oracle, XAttention

SIZE = 16
SELECTORS: list[Selector] = [
    UniSparse(block_size=SIZE, c_q=4, c_k=4, top_p=0.6, last_query_blocks=2),
    UniSparse(block_size=SIZE, c_q=4, c_k=8, top_k=3, sampled_queries=4, local_blocks=2),
    UniSparse(block_size=SIZE, c_q=2, c_k=2, c_h=2, threshold=0.1, last_query_blocks=0),
    FlashPrefill(block_size=SIZE),
    XAttention(block_size=SIZE, stride=4),
    Oracle(block_size=SIZE, top_p=0.7),
]
COMPOSITES = [s for s in SELECTORS if s.keys_per_composite is not None]


def geometry(
    q_len: int, kv_len: int, is_causal: bool, start: int = 0, stop: int = 0
) -> BlockGeometry:
    """Rows ``start`` to ``stop`` of a call; all of them by default."""
    stop = stop or q_len
    return BlockGeometry(
        q_len=stop - start,
        kv_len=kv_len,
        block_size=SIZE,
        causal_offset=kv_len - q_len + start if is_causal else None,
        rows_before=start,
        rows_after=q_len - stop,
    )


def select(selector: Selector, query: Tensor, key: Tensor, grid: BlockGeometry) -> Tensor:
    rows = query[:, :, grid.rows_before : grid.rows_before + grid.q_len]
    found = selector.compute_selection(rows, key, geometry=grid, scale=0.25, attn_mask=None)
    return found.keep


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@given(
    q_len=st.sampled_from([17, 63, 127, 129, 200]),
    behind=st.sampled_from([0, 1, 15, 16, 77]),
    is_causal=st.booleans(),
    cuts=st.sets(st.integers(1, 7), max_size=3),
)
def test_parts_keep_what_the_whole_keeps(
    selector: Selector, q_len: int, behind: int, is_causal: bool, cuts: set[int]
) -> None:
    assert selector.row_independent
    kv_len = q_len + behind
    query, key, _ = qkv(q_len, kv_len)
    whole = select(selector, query, key, geometry(q_len, kv_len, is_causal))
    ends = [0, *sorted(cut * SIZE for cut in cuts if cut * SIZE < q_len), q_len]
    parts = [
        select(selector, query, key, geometry(q_len, kv_len, is_causal, start, stop))
        for start, stop in pairwise(ends)
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("selector", COMPOSITES, ids=repr)
@pytest.mark.parametrize("kv_len", [100, 128, 203])
def test_composite_keys_are_all_that_is_needed(selector: Selector, kv_len: int) -> None:
    query, key, _ = qkv(100, kv_len)
    grid = geometry(100, kv_len, True)
    parts = [
        selector.pool_keys(
            key[:, :, start : start + 48], blocks=-(-min(48, kv_len - start) // SIZE)
        )
        for start in range(0, kv_len, 48)
    ]
    group = selector.keys_per_composite
    assert group is not None
    tokens = torch.cat(parts, dim=2)
    counts = (kv_len - torch.arange(tokens.shape[2]) * group).clamp(0, group).float()[None]
    found = selector.select_from_composites(
        query, CompositeKeys(tokens=tokens, counts=counts), geometry=grid, scale=0.25
    )
    assert torch.equal(found.keep, select(selector, query, key, grid))


def test_a_selector_that_reads_every_key_takes_no_composites() -> None:
    query, key, _ = qkv(64)
    keys = CompositeKeys(tokens=key, counts=torch.ones(1, 64))
    for selector in (SELECTORS[1], SELECTORS[4]):
        assert selector.keys_per_composite is None
        with pytest.raises(NotImplementedError, match="must have the keys themselves"):
            selector.select_from_composites(
                query, keys, geometry=geometry(64, 64, True), scale=0.25
            )


def test_selectors_of_last_queries_say_that_they_need_all_rows() -> None:
    others = (FlexPrefill(), MInference(), StreamingLLM())
    assert not any(selector.row_independent for selector in others)
