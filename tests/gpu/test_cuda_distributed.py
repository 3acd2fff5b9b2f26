"""On CUDA: rows selected in parts, composite keys of other ranks, and ranks over NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.check import difference, kept_blocks
from tests.distributed.ranks import Ranks
from tests.gpu.test_cuda import on_cuda
from unisparse_flex import Selector, UniSparse, optimize
from unisparse_flex.block_masks import BlockGeometry, BlockSelection
from unisparse_flex.block_masks.granularity import CompositeKeys
from unisparse_flex.block_masks.scoring import default_scale
from unisparse_flex.distributed import ContextParallel, context_parallel_attention
from unisparse_flex.passes.attend.selected_attention import attend_selected
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision.flex_support import is_flash_installed

pytestmark = pytest.mark.gpu

SIZE = 128
SELECTORS: list[Selector] = [
    UniSparse.paper(top_p=0.7, last_query_blocks=3),
    UniSparse.paper(c_q=16, c_k=16, sampled_queries=4, top_k=5),
]


def geometry(length: int, start: int, stop: int) -> BlockGeometry:
    """Rows of a causal call."""
    return BlockGeometry(
        q_len=stop - start,
        kv_len=length,
        block_size=SIZE,
        causal_offset=start,
        rows_before=start,
        rows_after=length - stop,
    )


def select(selector: Selector, query: Tensor, key: Tensor, grid: BlockGeometry) -> BlockSelection:
    rows = query[:, :, grid.rows_before : grid.rows_before + grid.q_len]
    scale = default_scale(query.shape[3])
    return selector.compute_selection(rows, key, geometry=grid, scale=scale, attn_mask=None)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize("length", [2048, 2500])
def test_parts_keep_what_the_whole_keeps(selector: Selector, length: int) -> None:
    query, key, _ = on_cuda(length)
    whole = select(selector, query, key, geometry(length, 0, length)).keep
    ends = (0, 640, 1024, length)
    parts = [
        select(selector, query, key, geometry(length, ends[i], ends[i + 1])).keep for i in range(3)
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("length", [2048, 2500])
def test_composite_keys_of_parts_are_all_that_is_needed(length: int) -> None:
    query, key, _ = on_cuda(length)
    selector = UniSparse.paper(top_p=0.7)
    grid = geometry(length, 0, length)
    parts = key.split(1024, dim=2)
    pooled = [selector.pool_keys(part, blocks=-(-part.shape[2] // SIZE)) for part in parts]
    tokens = torch.cat(pooled, dim=2)
    counts = (length - torch.arange(tokens.shape[2], device="cuda") * 8).clamp(0, 8).float()[None]
    found = selector.select_from_composites(
        query,
        CompositeKeys(tokens=tokens, counts=counts),
        geometry=grid,
        scale=default_scale(query.shape[3]),
    )
    assert torch.equal(found.keep, select(selector, query, key, grid).keep)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("start", [0, 17408])
def test_rows_of_a_call_attend_to_their_blocks(start: int, backend: str) -> None:
    length = 34816
    if backend == "auto" and not is_flash_installed():
        pytest.skip("FlashAttention-4 is not installed")
    query, key, value = on_cuda(length, head_dim=128, batch=1)
    grid = geometry(length, start, start + 17408)
    selection = select(SELECTORS[1], query, key, grid)
    rows = query[:, :, start : start + 17408]
    call = SdpaCall(query=rows, key=key, value=value, enable_gqa=True)
    with torch.no_grad():
        output = attend_selected(call, selection, backend=backend)
        last = slice(17408 - 512, 17408)
        mask = selection.token_mask(last)
        exact = F.scaled_dot_product_attention(
            rows[:, :, last].double(),
            key.double(),
            value.double(),
            attn_mask=mask,
            enable_gqa=True,
        )
    assert difference(output[:, :, last].double(), exact) < 2e-2


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    ranks = Ranks(min(2, torch.cuda.device_count()), backend="nccl")
    yield ranks
    ranks.close()


class Call(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def run_call(selector: Selector, length: int, compiled: bool) -> tuple[float, int]:
    """Error and differing blocks of this rank's rows against the whole call on its device."""
    context = ContextParallel()
    tensors = on_cuda(length)
    whole = select(selector, tensors[0], tensors[1], geometry(length, 0, length))
    own = context.layout(length).blocks(context.rank)
    keep = torch.cat([whole.keep[:, :, slice(*span)] for span in own], dim=2)
    parts = [context.shard(tensor, 2) for tensor in tensors]
    with torch.no_grad():
        found = torch.cat(
            kept_blocks(
                lambda: context_parallel_attention(
                    *parts, context=context, selector=selector, is_causal=True
                )
            ),
            dim=2,
        )
        model: Any = optimize(Call(), selector, min_length=0, context=context)
        output = (torch.compile(model, fullgraph=True) if compiled else model)(*parts)
        query, key, value = (tensor.double() for tensor in tensors)
        exact = F.scaled_dot_product_attention(
            query, key, value, attn_mask=whole.token_mask(), enable_gqa=True
        )
    wrong = int((found != keep).sum())
    return difference(output.double(), context.shard(exact, 2)), wrong


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize(("length", "compiled"), [(2048, False), (2500, False), (2500, True)])
def test_ranks_over_nccl_equal_one_device(
    gpus: Ranks, selector: Selector, length: int, compiled: bool
) -> None:
    for error, wrong in gpus.run(run_call, selector, length, compiled):
        assert wrong == 0
        assert error < 2e-2


def run_dense(length: int) -> float:
    context = ContextParallel()
    tensors = on_cuda(length)
    model = optimize(Call(), UniSparse.paper(), min_length=10**9, context=context)
    with torch.no_grad():
        output = model(*(context.shard(tensor, 2) for tensor in tensors))
        expected = Call()(*tensors)
    return difference(output.float(), context.shard(expected, 2).float())


@pytest.mark.parametrize("length", [2500, 34816])
def test_dense_calls_over_nccl_equal_one_device(gpus: Ranks, length: int) -> None:
    assert all(error < 2e-2 for error in gpus.run(run_dense, length))
