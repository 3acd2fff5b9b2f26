"""Context parallel: ranks share a sequence, and keep and compute what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.models import qkv
from unisparse_flex import Selector, UniSparse
from unisparse_flex.block_masks.geometry import BlockGeometry
from unisparse_flex.block_masks.scoring import default_scale
from unisparse_flex.distributed import ContextParallel, context_parallel_attention
from unisparse_flex.selectors import FlashPrefill, XAttention

from .check import difference, kept_blocks
from .ranks import Ranks

PAPER = UniSparse.paper(block_size=16, c_q=4, c_k=4, top_p=0.7, last_query_blocks=2)
TWO = UniSparse(block_size=16, c_q=4, c_k=4, sampled_queries=4, top_p=0.5, threshold=0.05)
MERGED = UniSparse.paper(block_size=16, c_q=4, c_k=4, c_h=2, top_k=3)
SELECTORS = {
    "paper": PAPER,
    "two": TWO,
    "merged": MERGED,
    "flash_prefill": FlashPrefill(block_size=16),
    "xattention": XAttention(block_size=16, stride=4),
}


def causal_offset(lengths: tuple[int, int], causal: str) -> int | None:
    """Key position of query row 0, by the flag that is given; ``None`` for none."""
    q_len, kv_len = lengths
    return {"": None, "is_causal": 0, "causal_lower_right": kv_len - q_len}[causal]


def select_alone(selector: Selector, query: Tensor, key: Tensor, causal: str) -> Tensor:
    """What one process keeps: [B, Hq, Nq, Nk]."""
    q_len, kv_len = query.shape[2], key.shape[2]
    geometry = BlockGeometry(
        q_len=q_len,
        kv_len=kv_len,
        block_size=selector.block_size,
        causal_offset=causal_offset((q_len, kv_len), causal),
    )
    return selector.compute_selection(
        query, key, geometry=geometry, scale=default_scale(query.shape[3]), attn_mask=None
    ).keep


def attend_alone(keep: Tensor, size: int, tensors: Any, causal: str) -> Tensor:
    """Masked SDPA over kept blocks, in float64."""
    query, key, value = (t.double() for t in tensors)
    q_len, kv_len = query.shape[2], key.shape[2]
    mask = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]
    offset = causal_offset((q_len, kv_len), causal)
    if offset is not None:
        mask = mask & torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


def run_call(
    selector: Selector,
    lengths: tuple[int, int],
    causal: str,
    options: dict[str, Any],
    heads: tuple[int, int] = (4, 2),
    pieces: tuple[int, ...] = (),
) -> tuple[float, int, int]:
    """Error of the output, differing blocks and kept blocks of this rank's rows."""
    context = ContextParallel(block_size=16, **options)
    tensors = qkv(*lengths, heads=heads, batch=2)
    query, key, value = tensors
    keep = select_alone(selector, query, key, causal)
    expected = attend_alone(keep, 16, tensors, causal)
    flags: dict[str, Any] = {causal: True} if causal else {}
    layout = context.layout(*(pieces or (lengths[1],)))
    output: Tensor | None = None

    def run() -> None:
        nonlocal output
        output = context_parallel_attention(
            context.shard(query, 2),
            layout.shard(key, 2, context.rank),
            layout.shard(value, 2, context.rank),
            context=context,
            selector=selector,
            pieces=pieces,
            **flags,
        )

    found = torch.cat(kept_blocks(run), dim=2)
    assert output is not None
    rows = context.layout(lengths[0])
    mine = torch.cat([keep[:, :, slice(*span)] for span in rows.blocks(context.rank)], dim=2)
    wrong = int((found != mine).sum())
    error = difference(context.gather(output, 2), expected)
    return error, wrong, int(found.sum())


def assert_equal(results: list[tuple[float, int, int]]) -> None:
    for error, wrong, kept in results:
        assert wrong == 0
        assert kept > 0
        assert error < 2e-6


@pytest.mark.parametrize("causal", ["is_causal", ""], ids=["causal", "whole"])
@pytest.mark.parametrize("name", SELECTORS)
def test_four_ranks_keep_the_blocks_of_one_process(four: Ranks, name: str, causal: str) -> None:
    assert_equal(four.run(run_call, SELECTORS[name], (301, 301), causal, {}))


@pytest.mark.parametrize("length", [64, 65, 127, 128, 129, 255, 333])
@pytest.mark.parametrize("name", ["paper", "two"])
def test_every_length_is_shared_out(four: Ranks, name: str, length: int) -> None:
    assert_equal(four.run(run_call, SELECTORS[name], (length, length), "is_causal", {}))


@pytest.mark.parametrize("lengths", [(64, 80), (80, 203), (99, 291), (200, 301)])
@pytest.mark.parametrize("name", ["paper", "two"])
def test_queries_end_where_the_keys_end(four: Ranks, name: str, lengths: tuple[int, int]) -> None:
    assert_equal(four.run(run_call, SELECTORS[name], lengths, "causal_lower_right", {}))


@pytest.mark.parametrize("lengths", [(80, 203), (200, 301), (203, 80), (301, 200)])
@pytest.mark.parametrize("name", ["paper", "two"])
def test_is_causal_begins_where_the_keys_begin(
    four: Ranks, name: str, lengths: tuple[int, int]
) -> None:
    assert_equal(four.run(run_call, SELECTORS[name], lengths, "is_causal", {}))


def test_a_cache_of_several_pieces_is_shared_out_piece_by_piece(four: Ranks) -> None:
    lengths, flag = (99, 96 + 80 + 99), "causal_lower_right"
    assert_equal(four.run(run_call, PAPER, lengths, flag, {}, (4, 2), (96, 80, 99)))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_groups_of_heads_share_what_is_fetched(two: Ranks, heads: tuple[int, int]) -> None:
    assert_equal(two.run(run_call, PAPER, (200, 200), "is_causal", {}, heads))


def test_ranks_can_hold_one_run_of_rows(two: Ranks) -> None:
    assert_equal(two.run(run_call, TWO, (200, 200), "is_causal", {"balanced": False}))
