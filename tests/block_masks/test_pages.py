"""Keys in pages: means, selections and page tables are those of the keys in one piece."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry, BlockSelection, default_scale, pool_tokens
from unisparse_flex.block_masks.pages import (
    PagedKeys,
    PageSummaries,
    PageTables,
    name_pages,
    paged_obstacle,
    select_from_pages,
)
from unisparse_flex.selectors import StreamingLLM

from .paged import Cache, fill_cache

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def create_cache(length: int, **options: Any) -> Cache:
    shape = (1, KV_HEADS, length, HEAD_DIM)
    return fill_cache(tokens(*shape, seed=1), tokens(*shape, seed=2), **options)


def geometry_of(q_len: int, length: int, size: int, **more: Any) -> BlockGeometry:
    offset = length - q_len
    return BlockGeometry(q_len=q_len, kv_len=length, block_size=size, causal_offset=offset, **more)


@given(
    length=st.integers(1, 300),
    page=st.sampled_from([16, 32, 64]),
    c_k=st.sampled_from([8, 16, 64]),
    chunk=st.integers(1, 100),
)
def test_composites_of_pages_are_those_of_the_keys(
    length: int, page: int, c_k: int, chunk: int
) -> None:
    cache = create_cache(length, page=page, c_k=c_k, chunk=chunk)
    groups = -(-length // 64) * (64 // c_k)
    found = cache.keys.composites(c_k, groups=groups)
    expected, counts = pool_tokens(cache.key, c_k, groups=groups)
    torch.testing.assert_close(found.tokens, expected)
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(cache.keys.gather(), cache.key)


def test_a_page_that_another_sequence_takes_over_has_its_own_mean() -> None:
    pages = tokens(3, 1, 16, HEAD_DIM)
    summaries = PageSummaries.create(pages, 16)
    means = summaries.means
    summaries.update(torch.arange(48))
    pages[1] = 7.0
    summaries.update(torch.arange(16, 31))
    assert not torch.equal(means[1], torch.full_like(means[1], 7.0))
    summaries.update(torch.tensor([31, -1]))
    assert torch.equal(means[1], torch.full_like(means[1], 7.0))
    torch.testing.assert_close(means[0], pages[0].mean(1, keepdim=True))


def test_an_infinite_key_makes_its_mean_nan() -> None:
    pages = tokens(1, 1, 16, HEAD_DIM)
    pages[0, 0, 3, 2] = torch.inf
    summaries = PageSummaries.create(pages, 16)
    summaries.update(torch.tensor([15]))
    assert summaries.means[0, 0, 0].isnan().tolist() == [i == 2 for i in range(HEAD_DIM)]


@settings(max_examples=25)
@given(
    q_len=st.integers(1, 200),
    before=st.integers(0, 200),
    page=st.sampled_from([16, 32, 64]),
    samples=st.sampled_from([0, 4]),
)
def test_a_selection_from_pages_is_that_from_the_keys(
    q_len: int, before: int, page: int, samples: int
) -> None:
    length = q_len + before
    selector = UniSparse(block_size=64, top_p=0.6, sampled_queries=samples)
    cache = create_cache(length, page=page, c_k=selector.c_k)
    query = tokens(1, HEADS, q_len, HEAD_DIM, seed=3)
    geometry, scale = geometry_of(q_len, length, 64), default_scale(HEAD_DIM)
    found = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=scale)
    expected = selector.compute_selection(
        query, cache.key, geometry=geometry, scale=scale, attn_mask=None
    )
    assert torch.equal(found.kept(), expected.keep & expected.visible)


def test_rows_that_follow_leave_the_last_block_to_the_rule() -> None:
    selector = UniSparse(block_size=16, top_k=2)
    cache = create_cache(160, page=16, c_k=16)
    query = tokens(1, HEADS, 64, HEAD_DIM, seed=3)
    counts = []
    for rows_after in (0, 64):
        geometry = geometry_of(64, 160, 16, rows_after=rows_after)
        lists = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=1.0)
        counts.append(lists.kept().sum(-1)[0, :, -1].tolist())
    assert counts == [[10] * HEADS, [2] * HEADS]


def attend_tables(
    query: Tensor, cache: Cache, out: PageTables, steps: tuple[int, int], size: int
) -> Tensor:
    """Plain causal attention of every sequence of the tables, aligned at the end."""
    page = cache.keys.page
    q_len = query.shape[2]
    blocks = -(-q_len // size)
    result = torch.full_like(query, torch.nan)
    for sequence, keys in enumerate(out.lengths.tolist()):
        head, block = divmod(sequence, blocks)
        rows = slice(block * size, min(block * size + size, q_len))
        numbers = out.tables[sequence, : -(-keys // page)].long()
        # Undoes what `steps` did.
        physical, kv_head = numbers // steps[0], numbers % steps[0] // steps[1]
        held = cache.packed[physical, kv_head].flatten(0, 1)[:keys]
        key, value = held.split(HEAD_DIM, -1)
        count = rows.stop - rows.start
        seen = torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
        logits = (query[0, head, rows] @ key.T).masked_fill(~seen, -torch.inf)
        result[0, head, rows] = logits.softmax(-1) @ value
    return result


@settings(max_examples=25)
@given(
    q_len=st.integers(1, 150),
    before=st.integers(0, 150),
    page=st.sampled_from([16, 64]),
    top_k=st.integers(1, 3),
)
def test_sequences_of_kept_pages_attend_as_the_selection(
    q_len: int, before: int, page: int, top_k: int
) -> None:
    length = q_len + before
    selector = UniSparse(block_size=64, top_k=top_k)
    cache = create_cache(length, page=page, c_k=selector.c_k)
    query = tokens(1, HEADS, q_len, HEAD_DIM, seed=3)
    geometry = geometry_of(q_len, length, 64)
    lists = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=1.0)
    q_blocks = geometry.num_q_blocks
    counter = torch.zeros(1, dtype=torch.int64)
    out = PageTables.create(HEADS * q_blocks, geometry.num_kv_blocks * 64 // page, counter)
    name_pages(
        lists,
        cache.keys.table,
        out,
        geometry=geometry,
        page=page,
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        steps=(KV_HEADS, 1),
    )
    assert counter.item() == lists.kept().sum()
    found = attend_tables(query, cache, out, (KV_HEADS, 1), 64)
    selection = BlockSelection(
        keep=lists.kept(), visible=geometry.visible_blocks(query.device), geometry=geometry
    )
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (cache.key, cache.value))
    logits = (query @ key.mT).masked_fill(~selection.token_mask(), -torch.inf)
    torch.testing.assert_close(found, logits.softmax(-1) @ value)


def test_blocks_of_the_rows_own_positions_are_kept_whatever_the_selector() -> None:
    selector = StreamingLLM(block_size=16, sink_tokens=16, local_tokens=16)
    cache = create_cache(100, page=16, c_k=16)
    query = tokens(1, HEADS, 40, HEAD_DIM, seed=3)
    geometry = geometry_of(40, 100, 16)
    lists = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=1.0)
    own = geometry.local_blocks(1, query.device)
    assert bool(lists.kept()[..., own].all())


def test_what_needs_a_copy_of_the_keys_is_named() -> None:
    pages = tokens(2, KV_HEADS, 64, HEAD_DIM)
    assert "plain PyTorch" in str(paged_obstacle(UniSparse(), pages))
    assert "StreamingLLM" in str(paged_obstacle(StreamingLLM(), pages))


def test_keys_are_gathered_in_order() -> None:
    pages = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 1)
    keys = PagedKeys(
        pages=pages,
        table=torch.tensor([2, 0, 3], dtype=torch.int32),
        length=5,
        means=PageSummaries.create(pages, 2).means,
    )
    assert keys.gather().flatten().tolist() == [2, 2, 0, 0, 3]
