"""Sampled rows score blocks as their definition says, and see what pooled tokens cannot.

Symbols: B batch, Hq/Hkv heads, Hs composite heads, Nq/Nk blocks, Sq/Skv tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry, UniSparse, compute_block_scores, select_blocks
from unisparse_flex.block_masks.granularity import Sampled
from unisparse_flex.block_masks.scoring import compute_sampled_scores, default_scale

from . import oracle
from .mask_programs import Mask, masks
from .strategies import HEAD_DIM, Call, calls, divisors, random_masks

SCALE = default_scale(HEAD_DIM)


@st.composite
def sampled_calls(draw: st.DrawFn, *, causal: bool | None = None) -> Call:
    call = draw(calls(causal=causal))
    return call.with_selector(
        sampled_queries=draw(st.sampled_from(divisors(call.selector.block_size)))
    )


def library_scores(call: Call, attn_mask: Tensor | None = None) -> Tensor:
    return compute_sampled_scores(
        *call.query_key(),
        geometry=call.geometry,
        granularity=Sampled(queries=call.selector.sampled_queries, heads=call.selector.c_h),
        scale=SCALE,
        attn_mask=attn_mask,
    )


def defined_scores(call: Call, weight: Tensor | None = None) -> Tensor:
    """[B, Hs, Nq, Nk]; ``weight`` [B, Hq, Sq, Skv] multiplies exponentials, 0 hides."""
    query, key = call.query_key()
    if weight is None:
        pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
        weight = pairs.double().expand(call.batch, call.q_heads, -1, -1)
    size, c_h = call.selector.block_size, call.selector.c_h
    step = size // call.selector.sampled_queries
    blocks = -(-call.q_len // size), -(-call.kv_len // size)
    scores = torch.zeros(call.batch, call.q_heads // c_h, *blocks, dtype=torch.float64)
    for b in range(call.batch):
        for composite in range(scores.shape[1]):
            heads = slice(composite * c_h, (composite + 1) * c_h)
            keys = key[b, heads.start // call.group]
            tokens = [0] * blocks[0]
            for first in range(0, call.q_len, step):
                rows = range(first, min(first + step, call.q_len))
                mean = query[b, heads, rows[-1]].mean(0)
                shown = weight[b, heads, rows[-1]].mean(0)
                logits = keys @ mean * SCALE
                mass = shown * (logits - logits.max()).exp()
                if mass.sum() == 0:
                    continue
                tokens[first // size] += len(rows)
                for j, part in enumerate((mass / mass.sum()).split(size)):
                    scores[b, composite, first // size, j] += len(rows) * part.sum()
            for i, count in enumerate(tokens):
                scores[b, composite, i] /= max(count, 1)
    return scores


@settings(max_examples=30)
@given(sampled_calls())
def test_sampled_scores_equal_the_definition(call: Call) -> None:
    torch.testing.assert_close(library_scores(call), defined_scores(call), rtol=0, atol=1e-10)


@pytest.mark.parametrize("residue", range(16))
def test_sampled_scores_equal_the_definition_at_every_offset(residue: int) -> None:
    selector = UniSparse(block_size=16, sampled_queries=4)
    for q_len in (1, 17, 30):
        call = Call(
            batch=1,
            kv_heads=1,
            group=2,
            q_len=q_len,
            kv_len=q_len + 16 + residue,
            causal=True,
            selector=selector,
            seed=residue,
        )
        torch.testing.assert_close(library_scores(call), defined_scores(call), rtol=0, atol=1e-10)


@settings(max_examples=20)
@given(sampled_calls(causal=False), st.data())
def test_what_a_bool_mask_hides_weighs_nothing(call: Call, data: st.DataObject) -> None:
    mask = data.draw(random_masks(call))
    weight = mask.double().expand(call.batch, call.q_heads, -1, -1)
    torch.testing.assert_close(
        library_scores(call, mask), defined_scores(call, weight), rtol=0, atol=1e-10
    )


@settings(max_examples=20)
@given(sampled_calls(causal=False), st.data())
def test_a_float_mask_is_added_to_the_logits(call: Call, data: st.DataObject) -> None:
    hidden = ~data.draw(random_masks(call))
    bias = torch.randn(hidden.shape, dtype=torch.float64, generator=call.generator())
    bias = bias.masked_fill(hidden, -math.inf)
    weight = bias.exp().expand(call.batch, call.q_heads, -1, -1)
    torch.testing.assert_close(
        library_scores(call, bias), defined_scores(call, weight), rtol=0, atol=1e-10
    )


@settings(max_examples=20)
@given(sampled_calls(causal=False), masks())
def test_a_proved_mask_hides_what_its_formula_says(call: Call, mask: Mask) -> None:
    call = replace(call, batch=mask.batch, q_len=mask.q_len, kv_len=mask.kv_len)
    geometry = replace(call.geometry, mask=mask.program())
    scores = compute_sampled_scores(
        *call.query_key(),
        geometry=geometry,
        granularity=Sampled(queries=call.selector.sampled_queries, heads=call.selector.c_h),
        scale=SCALE,
    )
    weight = mask.pairs()[:, None].double().expand(call.batch, call.q_heads, -1, -1)
    torch.testing.assert_close(scores, defined_scores(call, weight), rtol=0, atol=1e-10)


def test_a_mask_that_hides_everything_scores_nothing() -> None:
    query, key = torch.randn(1, 2, 20, 4), torch.randn(1, 1, 40, 4)
    scores = compute_sampled_scores(
        query,
        key,
        geometry=BlockGeometry(q_len=20, kv_len=40, block_size=16),
        granularity=Sampled(queries=4),
        scale=0.5,
        attn_mask=torch.zeros(20, 40, dtype=torch.bool),
    )
    assert scores.equal(torch.zeros(1, 2, 2, 3))


@settings(max_examples=30)
@given(sampled_calls())
def test_sampled_scores_are_shares_of_each_row(call: Call) -> None:
    scores = library_scores(call)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:-1], dtype=scores.dtype))


@settings(max_examples=20)
@given(sampled_calls())
def test_every_row_sampled_is_attention_itself(call: Call) -> None:
    call = call.with_selector(sampled_queries=call.selector.block_size, c_h=1)
    query, key = call.query_key()
    keys = key.repeat_interleave(call.group, dim=1)
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    logits = (query @ keys.mT * SCALE).masked_fill(~pairs, -math.inf)
    size = call.selector.block_size
    for i, rows in enumerate(logits.softmax(-1).split(size, dim=2)):
        for j, block in enumerate(rows.split(size, dim=3)):
            expected = block.sum(-1).mean(-1)
            torch.testing.assert_close(library_scores(call)[:, :, i, j], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sampled_scores_of_any_dtype_are_those_of_its_float32_upcast(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 2, 40, 4).to(dtype), torch.randn(1, 1, 50, 4).to(dtype)
    geometry = BlockGeometry(q_len=40, kv_len=50, block_size=16, causal_offset=10)
    found, expected = (
        compute_sampled_scores(*tokens, geometry=geometry, granularity=Sampled(heads=2), scale=0.5)
        for tokens in ((query, key), (query.float(), key.float()))
    )
    assert found.dtype is torch.float32
    assert found.equal(expected)


@settings(max_examples=30)
@given(sampled_calls())
def test_the_selection_follows_the_average_of_both_scores(call: Call) -> None:
    selector = call.selector
    pooled = compute_block_scores(
        *call.query_key(),
        geometry=call.geometry,
        granularity=selector.granularity,
        scale=SCALE,
    )
    keep, _ = select_blocks(
        (pooled + library_scores(call)) / 2,
        rule=selector.rule,
        forced_blocks=selector.forced_blocks,
        geometry=call.geometry,
    )
    assert call.keep().equal(oracle.per_query_head(keep, call))


@settings(max_examples=10)
@given(sampled_calls(causal=False), st.data())
def test_the_selection_under_a_mask_keeps_every_row_a_key(call: Call, data: st.DataObject) -> None:
    mask = data.draw(random_masks(call))
    kept = call.select(attn_mask=mask).token_mask() & mask
    assert (kept.any(-1) | ~mask.any(-1)).all()


def needle(position: int) -> tuple[Tensor, Tensor]:
    """A key that every query looks for, between two that cancel it out in their mean."""
    query, key = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    query[..., 0] = 8.0
    key[:, :, position, 0] = 8.0
    key[:, :, position + 1, 0] = -8.0
    return query, key


@pytest.mark.parametrize("is_causal", [False, True])
def test_sampled_rows_find_a_single_key_that_pooled_scores_miss(is_causal: bool) -> None:
    query, key = needle(position=37)
    pooled = UniSparse(
        block_size=16,
        threshold=0.25,
        sampled_queries=0,
        sink_blocks=0,
        last_query_blocks=0,
        c_q=8,
        c_k=8,
    )
    rows = slice(4, None)
    missed = pooled.select(query, key, is_causal=is_causal).keep[0, 0, rows, 2]
    found = replace(pooled, sampled_queries=1).select(query, key, is_causal=is_causal)
    assert not missed.any()
    assert found.keep[0, 0, rows, 2].all()
    # Every row keeps its own block and the needle's, and nothing else.
    assert (found.keep[0, 0, rows].sum(-1) == 2).all()


def test_only_the_last_row_of_a_group_is_sampled() -> None:
    query, key = needle(position=37)
    query[:, :, 15::16] = 0.0
    selector = UniSparse(
        block_size=16, threshold=0.25, sink_blocks=0, last_query_blocks=0, sampled_queries=1
    )
    assert not selector.select(query, key).keep[0, 0, 4:, 2].any()
    every = replace(selector, sampled_queries=16).select(query, key)
    assert every.keep[0, 0, 4:, 2].all()


@pytest.mark.parametrize("field", ["queries", "heads"])
def test_sampling_rejects_sizes_below_one(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        Sampled(**{field: 0})
