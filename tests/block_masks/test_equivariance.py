"""Heads, batch elements and chunks of queries are judged on their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import UniSparse

from .strategies import Call, calls


def permutation(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=generator)


@settings(max_examples=30)
@given(calls())
def test_permuting_gqa_groups_permutes_the_selection(call: Call) -> None:
    query, key = call.query_key()
    order = permutation(call.kv_heads, call.generator())
    heads = (order[:, None] * call.group + torch.arange(call.group)).flatten()
    permuted = call.keep(query[:, heads], key[:, order])
    assert permuted.equal(call.keep()[:, heads])


@settings(max_examples=30)
@given(calls())
def test_permuting_heads_inside_a_group_permutes_the_selection(call: Call) -> None:
    call = call.with_selector(c_h=1)
    query, key = call.query_key()
    inside = permutation(call.group, call.generator())
    heads = (torch.arange(call.kv_heads)[:, None] * call.group + inside).flatten()
    assert call.keep(query[:, heads], key).equal(call.keep()[:, heads])


@settings(max_examples=30)
@given(calls())
def test_permuting_heads_inside_a_composite_head_changes_nothing(call: Call) -> None:
    query, key = call.query_key()
    inside = permutation(call.selector.c_h, call.generator())
    starts = torch.arange(0, call.q_heads, call.selector.c_h)[:, None]
    assert call.keep(query[:, (starts + inside).flatten()], key).equal(call.keep())


@settings(max_examples=30)
@given(calls())
def test_heads_of_a_composite_head_share_one_selection(call: Call) -> None:
    keep = call.keep().unflatten(1, (-1, call.selector.c_h))
    assert keep.equal(keep[:, :, :1].expand_as(keep))


@settings(max_examples=30)
@given(calls())
def test_permuting_the_batch_permutes_the_selection(call: Call) -> None:
    query, key = call.query_key()
    order = permutation(call.batch, call.generator())
    assert call.keep(query[order], key[order]).equal(call.keep()[order])


@settings(max_examples=30)
@given(calls())
def test_a_batch_element_alone_is_selected_as_in_the_batch(call: Call) -> None:
    query, key = call.query_key()
    together = call.keep()
    for b in range(call.batch):
        assert call.keep(query[b : b + 1], key[b : b + 1]).equal(together[b : b + 1])


@settings(max_examples=30)
@given(calls(), st.sampled_from([0.0, 1e6, float("inf"), float("nan")]))
def test_changing_one_batch_element_leaves_the_others(call: Call, value: float) -> None:
    call = replace(call, batch=3)
    query, key = call.query_key()
    query[1], key[1] = value, value
    assert call.keep(query, key)[[0, 2]].equal(call.keep()[[0, 2]])


@settings(max_examples=30)
@given(calls(causal=True, square=True), st.data())
def test_the_last_rows_as_a_chunk_select_as_in_the_whole(call: Call, data: st.DataObject) -> None:
    call = call.with_selector(last_query_blocks=0)
    size = call.selector.block_size
    first = data.draw(st.integers(0, (call.q_len - 1) // size))
    query, key = call.query_key()
    chunk = call.keep(query[:, :, first * size :], key)
    assert chunk.equal(call.keep()[:, :, first:])


@settings(max_examples=30)
@given(calls(causal=True, square=True), st.data())
def test_whole_blocks_in_the_middle_select_as_in_the_whole(call: Call, data: st.DataObject) -> None:
    size = call.selector.block_size
    blocks = call.q_len // size
    assume(blocks > 0)
    call = call.with_selector(last_query_blocks=0)
    first = data.draw(st.integers(0, blocks - 1))
    end = data.draw(st.integers(first + 1, blocks))
    query, key = call.query_key()
    chunk = call.keep(query[:, :, first * size : end * size], key[:, :, : end * size])
    assert chunk.equal(call.keep()[:, :, first:end, :end])


@settings(max_examples=30)
@given(calls(causal=True, square=True))
def test_later_tokens_leave_earlier_blocks(call: Call) -> None:
    call = call.with_selector(last_query_blocks=0)
    size = call.selector.block_size
    split = call.q_len // size // 2 * size
    query, key = call.query_key()
    query[:, :, split:], key[:, :, split:] = float("nan"), float("nan")
    assert call.keep(query, key)[:, :, : split // size].equal(call.keep()[:, :, : split // size])


@settings(max_examples=20)
@given(calls())
def test_selection_is_deterministic(call: Call) -> None:
    assert call.keep().equal(call.keep())


@settings(max_examples=20)
@given(calls())
def test_memory_layout_leaves_the_selection(call: Call) -> None:
    query, key = call.query_key()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key)]
    assert call.keep(*strided).equal(call.keep())


@pytest.mark.parametrize("is_causal", [False, True])
def test_selection_records_no_gradient(is_causal: bool) -> None:
    query, key = (torch.randn(1, 2, 40, 4, requires_grad=True) for _ in range(2))
    selection = UniSparse(block_size=16).select(query, key, is_causal=is_causal)
    assert not selection.keep.requires_grad
    assert not selection.density_tensor().requires_grad
