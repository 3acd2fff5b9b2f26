"""Padding, as a bool mask states it, takes no part in what is selected.

A padded query sees no key and a padded key is seen by no query: the mask is the outer product of
the two, with causality where there is any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import compute_block_scores
from unisparse_flex.block_masks.mask_summary import summarize_mask
from unisparse_flex.block_masks.scoring import default_scale

from .strategies import HEAD_DIM, Call, calls

GARBAGE = st.sampled_from([0.0, 1e5, float("inf"), float("-inf"), float("nan")])
SIDES = st.sampled_from(["left", "right"])


def padding_mask(valid: Tensor, *, causal: bool) -> Tensor:
    """bool [B, 1, S, S] from the valid tokens [B, S] of self-attention."""
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    return mask.tril() if causal else mask


def ragged_batch(call: Call, side: str, data: st.DataObject) -> Tensor:
    """Valid tokens [B, S]: at least one for each element, padding on one side."""
    counts = [data.draw(st.integers(1, call.q_len)) for _ in range(call.batch)]
    rows = torch.stack([torch.arange(call.q_len) < count for count in counts])
    return rows if side == "right" else rows.flip(-1)


@settings(max_examples=40)
@given(calls(causal=False, square=True), SIDES, st.booleans(), GARBAGE, st.data())
def test_padded_tokens_may_hold_anything(
    call: Call, side: str, causal: bool, garbage: float, data: st.DataObject
) -> None:
    valid = ragged_batch(call, side, data)
    mask = padding_mask(valid, causal=causal)
    query, key = call.query_key()
    padding = ~valid[:, None, :, None]
    spoilt = call.select(
        query.masked_fill(padding, garbage), key.masked_fill(padding, -garbage), attn_mask=mask
    )
    assert spoilt.keep.equal(call.select(attn_mask=mask).keep)


@settings(max_examples=20)
@given(calls(causal=False), SIDES, GARBAGE, st.data())
def test_keys_behind_a_key_padding_mask_may_hold_anything(
    call: Call, side: str, garbage: float, data: st.DataObject
) -> None:
    query, key = call.query_key()
    valid = ragged_batch(replace(call, q_len=call.kv_len), side, data)
    mask = valid[:, None, None, :]
    spoilt = call.select(query, key.masked_fill(~valid[:, None, :, None], garbage), attn_mask=mask)
    assert spoilt.keep.equal(call.select(attn_mask=mask).keep)


@settings(max_examples=20)
@given(calls(causal=False, square=True), GARBAGE, st.data())
def test_padded_queries_that_see_keys_change_their_own_blocks_only(
    call: Call, garbage: float, data: st.DataObject
) -> None:
    query, _ = call.query_key()
    valid = ragged_batch(call, "right", data)
    mask = valid[:, None, None, :]
    spoilt = call.select(query.masked_fill(~valid[:, None, :, None], garbage), attn_mask=mask)
    clean = call.select(attn_mask=mask)
    for b, count in enumerate(valid.sum(-1).tolist()):
        real = count // call.selector.block_size
        assert spoilt.keep[b, :, :real].equal(clean.keep[b, :, :real])


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=20)
@given(call=calls(causal=False, square=True), causal=st.booleans(), blocks=st.integers(1, 2))
def test_padding_by_whole_blocks_moves_the_selection_and_nothing_else(
    side: str, call: Call, causal: bool, blocks: int
) -> None:
    query, key = call.query_key()
    extra = blocks * call.selector.block_size
    padding = (0, 0, extra, 0) if side == "left" else (0, 0, 0, extra)
    padded_query, padded_key = (
        torch.nn.functional.pad(t, padding, value=float("nan")) for t in (query, key)
    )
    alone = torch.ones(call.batch, call.q_len, dtype=torch.bool)
    valid = torch.nn.functional.pad(alone, padding[2:])
    longer = replace(call, q_len=call.q_len + extra, kv_len=call.kv_len + extra)

    padded = longer.select(padded_query, padded_key, attn_mask=padding_mask(valid, causal=causal))
    unpadded = call.select(attn_mask=padding_mask(alone, causal=causal))

    before = (blocks, 0) if side == "left" else (0, blocks)
    expected = torch.nn.functional.pad(unpadded.keep, before * 2)
    assert padded.keep.equal(expected)


@settings(max_examples=20)
@given(calls(causal=False, square=True), SIDES, st.booleans(), st.data())
def test_an_element_of_a_padded_batch_is_selected_as_alone(
    call: Call, side: str, causal: bool, data: st.DataObject
) -> None:
    mask = padding_mask(ragged_batch(call, side, data), causal=causal)
    query, key = call.query_key()
    together = call.select(attn_mask=mask)
    for b in range(call.batch):
        one = slice(b, b + 1)
        alone = call.select(query[one], key[one], attn_mask=mask[one])
        assert alone.keep.equal(together.keep[one])


@settings(max_examples=20)
@given(calls(causal=False))
def test_a_mask_that_hides_nothing_changes_no_score(call: Call) -> None:
    query, key = call.query_key()
    geometry, granularity = call.geometry, call.selector.granularity
    mask = torch.ones(call.q_len, call.kv_len, dtype=torch.bool)
    summary = summarize_mask(mask, geometry, c_q=granularity.q, c_k=granularity.k)
    options: dict[str, Any] = {
        "geometry": geometry,
        "granularity": granularity,
        "scale": default_scale(HEAD_DIM),
    }
    masked = compute_block_scores(query, key, **options, mask=summary)
    torch.testing.assert_close(
        masked, compute_block_scores(query, key, **options), rtol=0, atol=1e-6
    )


@settings(max_examples=20)
@given(calls(causal=False, square=True), SIDES, st.data())
def test_no_block_of_padding_is_kept(call: Call, side: str, data: st.DataObject) -> None:
    valid = ragged_batch(call, side, data)
    mask = padding_mask(valid, causal=False)
    keep = call.select(attn_mask=mask).keep
    size = call.selector.block_size
    for b in range(call.batch):
        real = torch.tensor([bool(part.any()) for part in valid[b].split(size)])
        assert not keep[b, :, ~real].any()
        assert not keep[b, :, :, ~real].any()
