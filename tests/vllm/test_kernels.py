"""The parents' kernels over page tables of kept blocks, against plain attention to these blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.block_masks.paged import Cache, fill_cache
from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockSelection
from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    PageSummaries,
    PageTables,
    estimate_masses,
    keep_units,
    select_from_pages,
)
from unisparse_flex.integrations.vllm import kernels
from unisparse_flex.integrations.vllm.cache_view import CacheView
from unisparse_flex.integrations.vllm.decode_rows import DecodeRows, DecodeSpace, attend_decode
from unisparse_flex.integrations.vllm.planning import Row
from unisparse_flex.integrations.vllm.sparse_rows import SparseRows, attend_sparse, geometry_of

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
SCALE = 0.2


def attend_plainly(
    query: Tensor, cache: Cache, selector: UniSparse, row: Row
) -> tuple[Tensor, Tensor]:
    """Attention in float32 to what the selector keeps, [Hq, n, D], and the kept blocks."""
    geometry = geometry_of(row, selector)
    lists = select_from_pages(selector, query, cache.keys, geometry=geometry, scale=SCALE)
    selection = BlockSelection(
        keep=lists.kept(), visible=geometry.visible_blocks(query.device), geometry=geometry
    )
    group = HEADS // KV_HEADS
    key, value = (t.float().repeat_interleave(group, 1) for t in (cache.key, cache.value))
    logits = (query.float() @ key.mT * SCALE).masked_fill(~selection.token_mask(), -torch.inf)
    return (logits.softmax(-1) @ value)[0], lists.kept()


def run(
    kernel: Any, layer: Any, view: CacheView, cache: Cache, query: Tensor, row: Row, rule: UniSparse
) -> Tensor:
    """[Hq, n, D] of `attend_sparse` for one row that begins after three other tokens."""
    impl = layer.impl
    tables = cache.keys.table[None]
    tokens = torch.zeros(row.stop, HEADS, HEAD_DIM, dtype=query.dtype, device=query.device)
    tokens[row.start :] = query[0].transpose(0, 1)
    output = torch.zeros_like(tokens)
    split = SparseRows([row], query.device)
    attend_sparse(impl, layer, kernel, view, cache.keys.means, rule, split, tables, tokens, output)
    assert not output[: row.start].any()
    return output[row.start :].transpose(0, 1)


def random(*shape: int, seed: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like)


@pytest.mark.parametrize(("queries", "length"), [(128, 128), (300, 300), (257, 1000)])
@pytest.mark.parametrize("page", [32, 128])
def test_the_kernel_of_the_cpu_attends_to_the_kept_blocks(
    page: int, queries: int, length: int
) -> None:
    rule = UniSparse(top_k=2)
    like = torch.empty(0)
    shape = (1, KV_HEADS, length, HEAD_DIM)
    cache = fill_cache(
        random(*shape, seed=1, like=like), random(*shape, seed=2, like=like), page=page, c_k=128
    )
    # As the CPU's kernels hold it: keys as [D, P], then values.
    packed = cache.packed.nan_to_num()
    own = torch.cat(
        [packed[..., :HEAD_DIM].mT.flatten(2), packed[..., HEAD_DIM:].flatten(2)], -1
    ).view(packed.shape)
    impl = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, scale=SCALE)
    layer = SimpleNamespace(impl=impl, isa="vec")
    kernel = kernels.CpuKernel()
    view = kernel.view(layer, own)
    assert isinstance(view, CacheView)
    torch.testing.assert_close(view.pages, packed[..., :HEAD_DIM])
    query = random(1, HEADS, queries, HEAD_DIM, seed=3, like=like)
    row = Row(index=0, start=3, stop=3 + queries, length=length)
    expected, kept = attend_plainly(query, cache, rule, row)
    found = run(kernel, layer, view, cache, query, row, rule)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert length < 1000 or kept.float().mean() < 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "triton"])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize(
    ("page", "queries", "length"),
    [(128, 300, 300), (128, 2000, 5001), (128, 8192, 40000), (16, 2000, 5001), (64, 2000, 5001)],
)
def test_the_kernels_of_gpus_attend_to_the_kept_blocks(
    name: str, heads_inside: bool, page: int, queries: int, length: int
) -> None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    rule = UniSparse(top_k=5)
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    shape = (1, KV_HEADS, length, HEAD_DIM)
    cache = fill_cache(
        random(*shape, seed=1, like=like),
        random(*shape, seed=2, like=like),
        page=page,
        c_k=128,
        heads_inside=heads_inside,
    )
    impl = SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM,
        scale=SCALE,
        vllm_flash_attn_version=get_flash_attn_version(),
    )
    one = torch.ones(1, device="cuda")
    layer = SimpleNamespace(impl=impl, _k_scale=one, _v_scale=one)
    kernel: Any = kernels.FlashKernel() if name == "flash" else kernels.TritonKernel()
    # As vLLM's, a cache holds zeros where nobody wrote: kernels read to the end of a page.
    view = kernel.view(layer, cache.packed.nan_to_num_())
    assert isinstance(view, CacheView)
    query = random(1, HEADS, queries, HEAD_DIM, seed=3, like=like)
    row = Row(index=0, start=3, stop=3 + queries, length=length)
    expected, _ = attend_plainly(query, cache, rule, row)
    found = run(kernel, layer, view, cache, query, row, rule)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "triton"])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("page", "unit"), [(128, 32), (128, 128), (64, 32)])
def test_the_kernels_of_gpus_decode_over_the_kept_units(
    name: str, heads_inside: bool, batch: int, page: int, unit: int
) -> None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    lengths = [7001, 1, 128, 4000, 333][:batch]
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    shape = (80, KV_HEADS, page, 2 * HEAD_DIM)
    if heads_inside:
        packed = random(shape[0], page, KV_HEADS, shape[3], seed=1, like=like).transpose(1, 2)
    else:
        packed = random(*shape, seed=1, like=like)
    impl = SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM,
        scale=SCALE,
        vllm_flash_attn_version=get_flash_attn_version(),
    )
    one = torch.ones(1, device="cuda")
    layer = SimpleNamespace(impl=impl, _k_scale=one, _v_scale=one)
    kernel: Any = kernels.FlashKernel() if name == "flash" else kernels.TritonKernel()
    view = kernel.view(layer, packed, unit)
    assert isinstance(view, CacheView)
    summaries = PageSummaries.create(view.pages, page, unit=unit)
    assert summaries.units is not None
    summaries.update(torch.arange(shape[0] * page, device="cuda"))
    width = -(-max(lengths) // page) + 1
    generator = torch.Generator().manual_seed(2)
    tables = torch.stack([torch.randperm(shape[0], generator=generator) for _ in lengths])
    tables = torch.cat([tables, tables], 1)[:, :width].to("cuda", torch.int32)
    held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    selector = DecodeSelector(share=0.2, min_keys=0, unit=unit)
    # Rows lie among keys and values.
    query = random(batch, HEADS + 2 * KV_HEADS, HEAD_DIM, seed=3, like=like)[:, :HEADS]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    space = DecodeSpace.create(
        selector, torch.zeros_like(output), kv_heads=KV_HEADS, units=width * page // unit
    )
    rows = DecodeRows(lengths=held, tables=tables, tokens=slice(0, batch))
    attend_decode(impl, layer, kernel, view, summaries, space, rows, query, output)
    masses = estimate_masses(query, summaries.units, tables, held, scale=SCALE)
    units = units_of(space.names, view, tables)
    # Shares that round to another rank may change places.
    differ = units ^ keep_units(masses, held, selector)
    assert int(differ.sum((1, 2)).max()) <= 2
    kept = units.repeat_interleave(unit, -1)
    keys, values = (
        packed[tables.long()][..., part].transpose(1, 2).flatten(2, 3).float()
        for part in (slice(0, HEAD_DIM), slice(HEAD_DIM, None))
    )
    kept &= torch.arange(kept.shape[-1], device="cuda") < held[:, None, None]
    assert float(kept.float().sum() / (KV_HEADS * held.sum())) < 0.5
    grouped = query.float().unflatten(1, (KV_HEADS, -1)) * SCALE
    logits = (grouped @ keys.mT).masked_fill(~kept[:, :, None], -torch.inf)
    expected = (logits.softmax(-1) @ values).flatten(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


def units_of(names: PageTables, view: CacheView, tables: Tensor) -> Tensor:
    """Which units were named, in order: bool [batch, key heads, units]."""
    parts = view.pages.shape[2] // view.unit
    found = torch.zeros(len(tables), KV_HEADS, tables.shape[1] * parts, dtype=torch.bool)
    for sequence in range(len(tables) * KV_HEADS):
        request, head = divmod(sequence, KV_HEADS)
        every = [
            page * view.steps[0] + head * view.steps[1] + part * view.steps[2]
            for page in tables[request].tolist()
            for part in range(parts)
        ]
        unit = -1
        count = -(-int(names.lengths[sequence]) // view.unit)
        for number in names.tables[sequence, :count].tolist():
            unit = every.index(number, unit + 1)
            found[request, head, unit] = True
    return found.to(tables.device)
