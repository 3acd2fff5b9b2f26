"""Composite tokens and block scores are what their definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import UniSparse, compute_block_scores, pool_tokens
from unisparse_flex.block_masks.granularity import Pooled, pool_heads
from unisparse_flex.block_masks.scoring import default_scale

from . import oracle
from .strategies import HEAD_DIM, Call, calls, divisors, lengths

SMALL = UniSparse(block_size=16, c_q=4, c_k=4)


def library_scores(call: Call, scale: float = default_scale(HEAD_DIM)) -> Tensor:
    return compute_block_scores(
        *call.query_key(),
        geometry=call.geometry,
        granularity=call.selector.granularity,
        scale=scale,
    )


@settings(max_examples=40)
@given(calls())
def test_block_scores_equal_the_definition(call: Call) -> None:
    torch.testing.assert_close(library_scores(call), oracle.block_scores(call), rtol=0, atol=1e-10)


@settings(max_examples=10)
@given(calls(), st.floats(0.01, 3.0))
def test_block_scores_follow_the_scale(call: Call, scale: float) -> None:
    expected = oracle.block_scores(call, scale)
    torch.testing.assert_close(library_scores(call, scale), expected, rtol=0, atol=1e-10)


@settings(max_examples=40)
@given(calls())
def test_block_scores_are_shares_of_each_row(call: Call) -> None:
    scores = library_scores(call)
    assert scores.shape[1] == call.q_heads // call.selector.c_h
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:-1], dtype=scores.dtype))


@settings(max_examples=40)
@given(calls(causal=True))
def test_invisible_blocks_score_zero(call: Call) -> None:
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size)
    assert (library_scores(call)[..., ~visible] == 0).all()


@settings(max_examples=30)
@given(st.data())
def test_composite_tokens_divide_by_their_true_count(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([16, 32, 64]))
    group = data.draw(st.sampled_from(divisors(block_size)))
    length = data.draw(lengths(block_size))
    seed = data.draw(st.integers(0, 2**31))
    tokens = torch.randn(
        2, 3, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )

    groups = -(-length // block_size) * block_size // group
    means, counts = pool_tokens(tokens, group, groups=groups)

    assert means.shape == (2, 3, groups, 5)
    for c in range(means.shape[2]):
        chunk = tokens[:, :, c * group : (c + 1) * group]
        assert counts[0, c] == chunk.shape[2]
        expected = chunk.mean(2) if chunk.shape[2] else torch.zeros_like(means[:, :, c])
        torch.testing.assert_close(means[:, :, c], expected)


@settings(max_examples=30)
@given(st.data())
def test_composite_tokens_leave_invalid_tokens_out(data: st.DataObject) -> None:
    block_size, group = 16, data.draw(st.sampled_from(divisors(16)))
    length = data.draw(lengths(block_size, max_blocks=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    tokens = torch.randn(2, 3, length, 5, dtype=torch.float64, generator=generator)
    valid = torch.rand(2, length, generator=generator) < 0.5
    garbage = tokens.masked_fill(~valid[:, None, :, None], float("nan"))

    groups = -(-length // block_size) * block_size // group
    means, counts = pool_tokens(garbage, group, groups=groups, valid=valid)

    for b in range(2):
        for c in range(means.shape[2]):
            inside = torch.zeros(length, dtype=torch.bool)
            inside[c * group : (c + 1) * group] = True
            chosen = tokens[b, :, inside & valid[b]]
            assert counts[b, c] == chosen.shape[1]
            expected = chosen.mean(1) if chosen.shape[1] else torch.zeros(3, 5).double()
            torch.testing.assert_close(means[b, :, c], expected)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_heads_are_averaged_within_their_group_only(heads: int) -> None:
    composites = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    pooled = pool_heads(composites, kv_heads=2, heads=heads)
    assert pooled.shape == (2, 2, 6 // heads, 4, 5)
    for kv_head in range(2):
        for part in range(6 // heads):
            first = kv_head * 6 + part * heads
            expected = sum(composites[:, first + h] for h in range(heads)) / heads
            torch.testing.assert_close(pooled[:, kv_head, part], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_at_least_float32(dtype: torch.dtype) -> None:
    call = Call(
        batch=1, kv_heads=1, group=2, q_len=40, kv_len=50, causal=True, selector=SMALL, seed=0
    )
    query, key = (tensor.to(dtype) for tensor in call.query_key())
    scores = compute_block_scores(
        query, key, geometry=call.geometry, granularity=SMALL.granularity, scale=1.0
    )
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("field", ["q", "k", "heads"])
def test_granularity_rejects_sizes_below_one(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        Pooled(**{field: 0})
