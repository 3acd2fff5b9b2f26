"""StreamingLLM keeps the blocks that hold a pair of its token-level shape."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks.selectors import StreamingLLM

from . import oracle
from .baselines import SIZE, calls_of
from .strategies import Call

SHAPES: list[dict[str, Any]] = [
    {"sink_tokens": 0, "local_tokens": 1},
    {"sink_tokens": 4, "local_tokens": 18},
    {"sink_tokens": 17, "local_tokens": 16, "last_query_tokens": 1},
    {"sink_tokens": 16, "local_tokens": 17, "last_query_tokens": 18},
]


def defined(call: Call, first_key: int = 0, rows: int | None = None) -> torch.Tensor:
    """Blocks with a visible pair: sink, near, or of a last row; bool [Nq, Nk]."""
    selector = call.selector
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    end = call.q_len if rows is None else rows
    for row in range(call.q_len):
        for key in range(call.kv_len):
            sink = key < first_key + selector.sink_tokens
            near = abs(row + (call.offset or 0) - key) < selector.local_tokens
            if not (sink or near or row >= end - selector.last_query_tokens):
                pairs[row, key] = False
    return oracle.any_in_block(pairs, selector.block_size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_blocks_equal_the_definition(shape: dict[str, Any]) -> None:
    for call in calls_of(StreamingLLM(block_size=SIZE, **shape)):
        assert call.keep().equal(defined(call).expand(2, 4, -1, -1))


def test_all_heads_share_one_selection() -> None:
    call = calls_of(StreamingLLM(block_size=SIZE))[-1]
    assert call.select().keep.shape[:2] == (2, 1)


def test_sinks_are_counted_from_the_first_key_that_is_not_padding() -> None:
    selector = StreamingLLM(block_size=SIZE, sink_tokens=5, local_tokens=2, last_query_tokens=2)
    call = replace(calls_of(selector)[-1], q_len=112, kv_len=112)
    for padding in (1, 12, 16, 30):
        valid = torch.arange(112) >= padding
        mask = (valid[:, None] & valid[None, :]).tril()
        expected = defined(replace(call, causal=True), first_key=padding)
        seen = oracle.any_in_block(mask, SIZE)
        assert call.select(attn_mask=mask).keep[0, 0].equal(expected & seen)


def test_a_mask_by_head_is_obeyed_by_head() -> None:
    call = replace(calls_of(StreamingLLM(block_size=SIZE))[-1], q_len=50, kv_len=50)
    mask = torch.ones(1, 4, 50, 50, dtype=torch.bool)
    mask[:, 1, :, 16:32] = False
    keep = call.select(attn_mask=mask).keep
    assert keep.shape[:2] == (2, 4)
    assert not keep[:, 1, :, 1].any()
    assert keep[:, 0].all()


def test_without_known_positions_it_is_refused() -> None:
    query, key = torch.randn(1, 1, 20, 4), torch.randn(1, 1, 30, 4)
    with pytest.raises(ValueError, match=re.escape("got q_len 20 and kv_len 30")):
        StreamingLLM(block_size=SIZE).select(query, key)


def test_defaults_are_those_of_the_a_shape() -> None:
    selector = StreamingLLM()
    assert (selector.sink_tokens, selector.local_tokens, selector.last_query_tokens) == (
        128,
        1024,
        0,
    )
    assert selector.cost.row_blocks == 1 + 9


@pytest.mark.parametrize(
    "wrong",
    [{"sink_tokens": -1}, {"local_tokens": 0}, {"last_query_tokens": -1}, {"block_size": 24}],
    ids=str,
)
def test_wrong_values_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StreamingLLM(**wrong)


def test_expected_density_is_that_of_a_long_causal_call() -> None:
    selector = StreamingLLM(block_size=SIZE, sink_tokens=16, local_tokens=33)
    tokens = torch.randn(1, 1, 64 * SIZE, 4)
    expected = selector.cost.density(
        q_len=64 * SIZE, kv_len=64 * SIZE, block_size=SIZE, is_causal=True
    )
    found = selector.select(tokens, tokens, is_causal=True).density()
    assert found == pytest.approx(expected, rel=0.05)
