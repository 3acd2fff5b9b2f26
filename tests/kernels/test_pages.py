"""The kernels for keys in pages, against plain PyTorch and the kernels for keys in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.block_masks.paged import Cache, fill_cache
from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.kernels import settings_of
from unisparse_flex.block_masks.pages import PageSummaries, PageTables, name_pages

from .calls import KernelCall, fixed_call, head_thresholds_of, run
from .interpreter import Kernels


def cache_of(call: KernelCall, key: Tensor, page: int, **options: Any) -> Cache:
    return fill_cache(key, key + 1, page=page, c_k=call.selector.c_k, **options)


def run_paged(kernels: Kernels, call: KernelCall, query: Tensor, cache: Cache) -> BlockLists:
    return kernels.lists.compute_lists_from_pages(
        query,
        cache.keys.pages,
        cache.keys.table,
        cache.keys.means,
        settings_of(call.selector),
        geometry=call.geometry,
        scale=0.25,
        head_thresholds=head_thresholds_of(call),
    )


RULES: dict[str, dict[str, Any]] = {
    "blocks of a row": {"top_k": 3},
    "a threshold for each head": {"head_thresholds": (0.05, 0.3)},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("c_k", [4, 16])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 16), (19, 19), (40, 101), (33, 160)])
def test_lists_from_pages_are_those_from_the_keys(
    kernels: Kernels, q_len: int, kv_len: int, c_k: int, heads_inside: bool, rule: str
) -> None:
    call = fixed_call(q_len, kv_len, c_h=1, c_k=c_k, sampled_queries=2, **RULES[rule])
    query, key = call.query_key()
    query, key = query[:1], key[:1]
    cache = cache_of(call, key, 16, heads_inside=heads_inside)
    found = run_paged(kernels, call, query, cache).kept()
    assert torch.equal(found, run(kernels, call, query, key, scale=0.25).kept())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [4, 16])
def test_means_are_made_of_finished_pages_alone(
    kernels: Kernels, group: int, dtype: torch.dtype
) -> None:
    pages = torch.randn(5, 2, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    summaries = PageSummaries.create(pages, group)
    means = summaries.means
    slots = torch.tensor([-1, 15, 30, 40, *range(64, 80), -1])
    kernels.pages.summarize(pages, means, None, slots)
    expected = pages.float().unflatten(2, (16 // group, group)).mean(3)
    finished = torch.tensor([0, 4])
    # The interpreter rounds to bfloat16 towards 0.
    rtol = 2**-7 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(means[finished].float(), expected[finished], rtol=rtol, atol=1e-6)
    assert not means[1:4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page", "unit"), [(16, 4), (16, 16)])
def test_units_follow_every_token(
    kernels: Kernels, page: int, unit: int, dtype: torch.dtype
) -> None:
    pages = torch.randn(5, 2, page, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    pages[4, 0, 3, 1] = torch.inf
    found, expected = (PageSummaries.create(pages, page, unit=unit) for _ in range(2))
    for slots in ([-1, 15, 16, 17, 40, *range(62, 80), -1], [18], [19, 41, 0, 1], [-1, -1]):
        written = torch.tensor(slots)
        assert found.units is not None
        assert expected.units is not None
        units = found.units
        for one in (units, expected.units):
            one.pinned.fill_(1)
        kernels.pages.summarize(
            pages, found.means, (units.numbers, units.scales, units.pinned), written
        )
        expected.update(written)
        assert torch.equal(units.pinned, expected.units.pinned)
        assert units.pinned.any() or unit == page
    assert found.units is not None
    assert expected.units is not None
    every = torch.arange(5)
    assert bool(expected.units.scales.any(-1).any(-1).all())
    rtol = 2**-6 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.means, expected.means, rtol=rtol, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(found.units.read(every), expected.units.read(every), strict=True):
        # A number may be rounded the other way.
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=0.03, equal_nan=True)
    assert expected.units.read(every)[0][4, 0].isnan().any()


@pytest.mark.parametrize("page", [8, 16])
@pytest.mark.parametrize("c_k", [4, 16])
@pytest.mark.parametrize("length", [1, 8, 15, 16, 100])
def test_composites_of_pages_are_those_of_plain_pytorch(
    kernels: Kernels, length: int, c_k: int, page: int
) -> None:
    key = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(0))
    cache = fill_cache(key, key, page=page, c_k=c_k)
    keys = cache.keys
    groups = -(-length // 16) * (16 // c_k) + 2
    found = kernels.pages.pool_pages(
        keys.pages, keys.table, keys.means, length=length, group=c_k, groups=groups
    )
    torch.testing.assert_close(found, keys.composites(c_k, groups=groups).tokens)


@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_named_pages_are_those_of_plain_pytorch(kernels: Kernels, shared: bool, page: int) -> None:
    call = fixed_call(40, 101, sampled_queries=2, top_k=3)
    query, key = call.query_key()
    cache = cache_of(call, key[:1], page)
    lists = run(kernels, call, query[:1], key[:1])
    if shared:
        lists = BlockLists(*(tensor[:, :1].contiguous() for tensor in lists.tensors()))
    heads, kv_heads, geometry = query.shape[1], key.shape[1], call.geometry
    found, expected = (
        PageTables.create(
            heads * geometry.num_q_blocks + 2,
            geometry.num_kv_blocks * 16 // page,
            torch.zeros(1, dtype=torch.int64),
        )
        for _ in range(2)
    )
    steps = (kv_heads, 1)
    kernels.pages.name_pages(
        lists,
        cache.keys.table,
        found.tables,
        found.lengths,
        found.counter,
        geometry=geometry,
        page=page,
        group=heads // kv_heads,
        heads=heads,
        steps=steps,
        first=2,
    )
    name_pages(
        lists,
        cache.keys.table,
        expected,
        geometry=geometry,
        page=page,
        q_heads=heads,
        kv_heads=kv_heads,
        steps=steps,
        first=2,
    )
    assert torch.equal(found.lengths[2:], expected.lengths[2:])
    assert found.counter.item() == expected.counter.item()
    for sequence, keys in enumerate(found.lengths[2:].tolist(), start=2):
        used = slice(0, -(-keys // page))
        assert torch.equal(found.tables[sequence, used], expected.tables[sequence, used])
