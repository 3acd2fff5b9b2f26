"""On CUDA: means, selections and page tables of keys in pages against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.block_masks.paged import Cache, fill_cache
from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry, default_scale
from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.pages import (
    PageSummaries,
    PageTables,
    name_pages,
    paged_obstacle,
    select_from_pages,
)

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128


def tokens(*shape: int, seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to("cuda", torch.bfloat16)


def create_cache(length: int, **options: int | bool) -> Cache:
    shape = (1, KV_HEADS, length, HEAD_DIM)
    return fill_cache(tokens(*shape, seed=1), tokens(*shape, seed=2), c_k=128, **options)  # type: ignore[arg-type]


def geometry_of(q_len: int, length: int) -> BlockGeometry:
    offset = length - q_len
    return BlockGeometry(q_len=q_len, kv_len=length, block_size=128, causal_offset=offset)


@pytest.mark.parametrize("page", [16, 128])
def test_means_are_those_of_plain_pytorch(page: int) -> None:
    packed = tokens(9, KV_HEADS, page, 2 * HEAD_DIM, seed=3)
    pages = packed[..., :HEAD_DIM]
    summaries = PageSummaries.create(pages, page)
    means = summaries.means
    slots = torch.tensor([3 * page - 1, -1, 5 * page - 2, 8 * page - 1], device="cuda")
    summaries.update(slots)
    finished = torch.tensor([2, 7], device="cuda")
    expected = pages.float().mean(2, keepdim=True)[finished]
    torch.testing.assert_close(means[finished].float(), expected, rtol=2**-7, atol=1e-3)
    assert not means[4].any()


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize(("q_len", "length"), [(300, 300), (2048, 9001), (4096, 40000)])
@pytest.mark.parametrize(
    "selector",
    [
        UniSparse(),
        UniSparse(top_k=9),
        UniSparse.paper(),
        UniSparse(head_thresholds=(0.0, *(0.01,) * 6, 0.3), top_p=0.8, threshold_blocks=64),
    ],
)
def test_lists_from_pages_are_those_from_the_keys(
    selector: UniSparse, q_len: int, length: int, page: int, heads_inside: bool
) -> None:
    shape = (1, KV_HEADS, length, HEAD_DIM)
    cache = fill_cache(
        tokens(*shape, seed=1),
        tokens(*shape, seed=2),
        c_k=selector.c_k,
        page=page,
        heads_inside=heads_inside,
        chunk=1000,
    )
    assert paged_obstacle(selector, cache.keys.pages) is None
    query = 2 * tokens(1, HEADS, q_len, HEAD_DIM, seed=3)
    geometry, scale = geometry_of(q_len, length), default_scale(HEAD_DIM)
    found = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=scale).kept()
    expected = selector.compute_selection(
        query, cache.key, geometry=geometry, scale=scale, attn_mask=None
    ).keep
    # Sums in another order decide a block here and there.
    assert (found != expected).sum() <= 0.02 * expected.sum()


@pytest.mark.parametrize("page", [16, 64, 128])
def test_named_pages_are_those_of_plain_pytorch(page: int) -> None:
    length, q_len = 5000, 1000
    cache = create_cache(length, page=page)
    query = tokens(1, HEADS, q_len, HEAD_DIM, seed=3)
    geometry = geometry_of(q_len, length)
    lists = select_from_pages(UniSparse(top_k=5), query, cache.keys, geometry=geometry, scale=0.1)
    sequences, width = HEADS * geometry.num_q_blocks, geometry.num_kv_blocks * 128 // page
    on_gpu, on_cpu = (
        PageTables.create(sequences, width, torch.zeros(1, dtype=torch.int64, device=device))
        for device in ("cuda", "cpu")
    )
    for out, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
        name_pages(
            BlockLists(*(tensor.to(device) for tensor in lists.tensors())),
            cache.keys.table.to(device),
            out,
            geometry=geometry,
            page=page,
            q_heads=HEADS,
            kv_heads=KV_HEADS,
            steps=(KV_HEADS, 1),
        )
    assert torch.equal(on_gpu.lengths.cpu(), on_cpu.lengths)
    assert torch.equal(on_gpu.counter.cpu(), on_cpu.counter)
    for sequence, keys in enumerate(on_cpu.lengths.tolist()):
        used = slice(0, -(-keys // page))
        assert torch.equal(on_gpu.tables[sequence, used].cpu(), on_cpu.tables[sequence, used])


def test_lengths_that_share_a_power_of_two_share_their_kernels() -> None:
    from unisparse_flex.block_masks.kernels import score, select

    cache = create_cache(9000, page=128)
    for length in (9000, 8999, 8000, 5001):
        query = tokens(1, HEADS, 2048, HEAD_DIM, seed=3)
        keys = cache.keys
        from dataclasses import replace

        select_from_pages(
            UniSparse(),
            query,
            replace(keys, length=length),
            geometry=geometry_of(2048, length),
            scale=0.1,
        )
        if length == 9000:
            known = len(score._launch._compiled), len(select._launch._compiled)
    assert (len(score._launch._compiled), len(select._launch._compiled)) == known
