"""What a bool or float ``attn_mask`` does to scores and selection."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import UniSparse, compute_block_scores
from unisparse_flex.block_masks.mask_summary import summarize_mask
from unisparse_flex.block_masks.scoring import default_scale

from . import oracle
from .strategies import HEAD_DIM, Call, calls, random_masks

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def masked_scores(call: Call, attn_mask: Tensor) -> Tensor:
    selector = call.selector
    summary = summarize_mask(attn_mask, call.geometry, c_q=selector.c_q, c_k=selector.c_k)
    return compute_block_scores(
        *call.query_key(),
        geometry=call.geometry,
        granularity=selector.granularity,
        scale=default_scale(HEAD_DIM),
        mask=summary,
    )


def defined_scores(call: Call, attn_mask: Tensor) -> Tensor:
    """Scores of batch element 0, head by head.

    A cell that shows a pair weighs as many keys as it has, times its mean of exp(mask) over the
    pairs that it shows.
    """
    query, key = (tokens[0] for tokens in call.query_key())
    mask = attn_mask.expand(call.batch, call.q_heads, -1, -1)[0]
    weight = mask.double() if mask.dtype is torch.bool else mask.double().exp()
    any_batch = weight if attn_mask.shape[1] > 1 else weight[:1]
    sees, seen = any_batch.sum((0, 2)) > 0, any_batch.sum((0, 1)) > 0
    size, c_q, c_k = call.selector.block_size, call.selector.c_q, call.selector.c_k
    scores = torch.zeros(call.q_heads, -(-call.q_len // size), -(-call.kv_len // size)).double()
    for head in range(call.q_heads):
        for i in range(scores.shape[1]):
            total = 0
            for start in range(i * size, min((i + 1) * size, call.q_len), c_q):
                rows = slice(start, min(start + c_q, call.q_len))
                taking_part = query[head, rows][sees[rows]]
                mass = torch.zeros(scores.shape[2]).double()
                for first in range(0, call.kv_len, c_k):
                    columns = slice(first, first + c_k)
                    shown = weight[head, rows, columns]
                    shown = shown[shown > 0]
                    if shown.numel():
                        share = float(seen[columns].sum() * shown.mean())
                        pooled = key[head // call.group, columns][seen[columns]].mean(0)
                        logit = taking_part.mean(0) @ pooled / math.sqrt(HEAD_DIM)
                        mass[first // size] += share * logit.exp()
                if mass.any():
                    scores[head, i] += len(taking_part) * mass / mass.sum()
                    total += len(taking_part)
            scores[head, i] /= max(total, 1)
    return scores


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_masked_scores_equal_the_definition(call: Call, data: st.DataObject) -> None:
    call = call.with_selector(c_q=max(4, call.selector.c_q), c_k=max(4, call.selector.c_k), c_h=1)
    mask = data.draw(random_masks(call))
    scores = masked_scores(call, mask)[0]
    torch.testing.assert_close(scores, defined_scores(call, mask), rtol=0, atol=1e-6)


@settings(max_examples=15)
@given(calls(causal=False), st.data())
def test_biased_scores_equal_the_definition(call: Call, data: st.DataObject) -> None:
    call = call.with_selector(c_q=max(4, call.selector.c_q), c_k=max(4, call.selector.c_k), c_h=1)
    mask = data.draw(random_masks(call))
    noise = torch.randn(mask.shape, dtype=torch.float64, generator=call.generator())
    bias = noise.masked_fill(~mask, -math.inf)
    scores = masked_scores(call, bias)[0]
    torch.testing.assert_close(scores, defined_scores(call, bias), rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_a_float64_call_is_scored_in_float64_under_a_mask_too(
    call: Call, data: st.DataObject
) -> None:
    mask = data.draw(random_masks(call))
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(
        masked_scores(call, mask), masked_scores(call, bias), rtol=0, atol=1e-10
    )


@settings(max_examples=30)
@given(calls(causal=True, square=True), st.booleans())
def test_a_causal_mask_selects_as_is_causal(call: Call, additive: bool) -> None:
    mask = torch.ones(call.q_len, call.kv_len, dtype=torch.bool).tril()
    spelled: Tensor = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    by_flag, by_mask = call.select(), replace(call, causal=False).select(attn_mask=spelled)
    assert by_mask.keep.equal(by_flag.keep)
    assert by_mask.density() == by_flag.density()


@pytest.mark.parametrize("hidden", ["-inf", "minimum"])
@settings(max_examples=20)
@given(call=calls(causal=False), dtype=FLOATS, data=st.data())
def test_a_float_mask_that_hides_selects_as_the_bool_mask(
    hidden: str, call: Call, dtype: torch.dtype, data: st.DataObject
) -> None:
    mask = data.draw(random_masks(call))
    fill = -math.inf if hidden == "-inf" else torch.finfo(dtype).min
    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, fill)
    by_bool, by_float = call.select(attn_mask=mask), call.select(attn_mask=additive)
    assert by_float.keep.equal(by_bool.keep)
    assert by_float.visible.equal(by_bool.visible)


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_a_bias_that_makes_a_block_dominant_selects_it(call: Call, data: st.DataObject) -> None:
    call = call.with_selector(top_p=0.5, top_k=None, sink_blocks=0, last_query_blocks=0)
    i = data.draw(st.integers(0, call.geometry.num_q_blocks - 1))
    j = data.draw(st.integers(0, call.geometry.num_kv_blocks - 1))
    size = call.selector.block_size
    bias = torch.zeros(call.q_len, call.kv_len)
    bias[i * size : (i + 1) * size, j * size : (j + 1) * size] = 100.0
    assert call.select(attn_mask=bias).keep[:, :, i, j].all()


@settings(max_examples=20)
@given(calls(causal=False), st.floats(-5, 5))
def test_a_constant_bias_changes_nothing(call: Call, constant: float) -> None:
    zero = torch.zeros(call.q_len, call.kv_len, dtype=torch.float64)
    torch.testing.assert_close(
        masked_scores(call, zero + constant), masked_scores(call, zero), rtol=0, atol=1e-10
    )


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_no_row_that_sees_a_key_is_left_without_one(call: Call, data: st.DataObject) -> None:
    call = call.with_selector(top_p=None, top_k=1, sink_blocks=0, last_query_blocks=0)
    mask = data.draw(random_masks(call))
    kept = call.select(attn_mask=mask).token_mask() & mask
    assert (kept.any(-1) | ~mask.any(-1)).all()


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_visible_blocks_are_those_the_mask_shows(call: Call, data: st.DataObject) -> None:
    mask = data.draw(random_masks(call))
    visible = call.select(attn_mask=mask).visible
    assert visible.shape[:2] == mask.shape[:2]
    for b in range(mask.shape[0]):
        for head in range(mask.shape[1]):
            expected = oracle.any_in_block(mask[b, head], call.selector.block_size)
            assert visible[b, head].equal(expected)


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_no_block_that_the_mask_hides_from_a_head_is_kept(call: Call, data: st.DataObject) -> None:
    """Heads that share a selection also share what one of them sees."""
    mask = data.draw(random_masks(call))
    selection = call.select(attn_mask=mask)
    visible = selection.visible.expand(-1, call.q_heads, -1, -1)
    shared = visible.unflatten(1, (-1, call.selector.c_h)).any(2)
    reach = shared.repeat_interleave(call.selector.c_h, dim=1)
    assert not (selection.keep & ~reach).any()


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_density_never_exceeds_one(call: Call, data: st.DataObject) -> None:
    mask = data.draw(random_masks(call))
    assert 0 <= call.select(attn_mask=mask).density() <= 1


@settings(max_examples=12)
@given(calls(causal=False), st.data())
def test_a_mask_broadcasts_as_if_it_were_expanded(call: Call, data: st.DataObject) -> None:
    keys = torch.rand(call.batch, 1, 1, call.kv_len, generator=call.generator()) < 0.5
    shape = (call.batch, call.q_heads, call.q_len, call.kv_len)
    whole = call.select(attn_mask=keys.expand(shape).contiguous())
    # Heads that share a selection may be given once or once each.
    assert call.select(attn_mask=keys).keep.expand_as(whole.keep).equal(whole.keep)
    rank = data.draw(st.integers(0, 3))
    first = keys[0, 0, 0, 0] if rank == 0 else keys[0].reshape((1,) * (rank - 1) + (-1,))
    whole = call.select(attn_mask=first.expand(shape).contiguous())
    assert call.select(attn_mask=first).keep.expand_as(whole.keep).equal(whole.keep)


def test_a_mask_that_hides_everything_keeps_nothing() -> None:
    tokens = torch.randn(1, 2, 40, 4)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    selection = UniSparse(block_size=16).select(tokens, tokens, attn_mask=mask)
    assert not selection.keep.any()
    assert selection.density() == 0
