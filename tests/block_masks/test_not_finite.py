"""A NaN or an infinity reaches the output as in dense attention: who sees it keeps everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import UniSparse
from unisparse_flex.block_masks.validation import validate_value

from . import oracle
from .strategies import Call, calls

VALUES = st.sampled_from([float("nan"), float("inf"), float("-inf")])
CPU = torch.device("cpu")


def spoil(tokens: Tensor, value: float, data: st.DataObject) -> tuple[int, int, int]:
    """Writes ``value`` into one number of one token; says which batch, head and token."""
    b, head, token, channel = (data.draw(st.integers(0, n - 1)) for n in tokens.shape)
    tokens[b, head, token, channel] = value
    return b, head, token


def without_guards(call: Call) -> Call:
    return call.with_selector(sink_blocks=0, local_blocks=1, last_query_blocks=0)


@settings(max_examples=40)
@given(calls(), VALUES, st.data())
def test_a_query_that_is_not_finite_keeps_all_its_block_sees(
    call: Call, value: float, data: st.DataObject
) -> None:
    call = without_guards(call)
    query, key = call.query_key()
    b, head, token = spoil(query, value, data)
    expected, c_h = call.keep().clone(), call.selector.c_h
    row, first = token // call.selector.block_size, head // c_h * c_h
    expected[b, first : first + c_h, row] = call.geometry.visible_blocks(CPU)[row]
    assert call.keep(query, key).equal(expected)


@settings(max_examples=40)
@given(calls(), VALUES, st.data())
def test_a_key_that_is_not_finite_keeps_all_for_those_who_see_it(
    call: Call, value: float, data: st.DataObject
) -> None:
    """Who sees only earlier keys of the same composite key may keep all as well."""
    call = without_guards(call)
    query, key = call.query_key()
    b, head, token = spoil(key, value, data)
    before, after = call.keep(), call.keep(query, key)

    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    composite = token // call.selector.c_k * call.selector.c_k
    size, visible = call.selector.block_size, call.geometry.visible_blocks(CPU)
    sees = [bool(rows.any()) for rows in pairs[:, token].split(size)]
    near = [bool(rows.any()) for rows in pairs[:, composite].split(size)]
    heads = slice(head * call.group, (head + 1) * call.group)
    expected = before.clone()
    for i, (must, may) in enumerate(zip(sees, near, strict=True)):
        if must:
            expected[b, heads, i] = visible[i]
        elif may:
            expected[b, heads, i] = after[b, heads, i]
    assert after.equal(expected)


@settings(max_examples=40)
@given(calls(causal=False, square=True), VALUES, st.data())
def test_a_key_that_a_mask_hides_from_a_query_block_leaves_that_block(
    call: Call, value: float, data: st.DataObject
) -> None:
    call = without_guards(call)
    query, key = call.query_key()
    b, head, token = spoil(key, value, data)
    causal = torch.ones(call.q_len, call.kv_len, dtype=torch.bool).tril()
    before = call.select(attn_mask=causal).keep.expand(-1, call.q_heads, -1, -1)
    after = call.select(query, key, attn_mask=causal).keep.expand(-1, call.q_heads, -1, -1)
    row = token // call.selector.block_size
    heads = slice(head * call.group, (head + 1) * call.group)
    visible = call.geometry.visible_blocks(CPU) & oracle.any_in_block(
        causal, call.selector.block_size
    )
    expected = before.clone()
    expected[b, heads, row:] = visible[row:]
    assert after.equal(expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rule", [{"top_p": 0.2}, {"top_k": 1}])
def test_everything_not_finite_is_dense(rule: dict[str, Any], is_causal: bool) -> None:
    tokens = torch.full((1, 2, 70, 4), float("nan"))
    selector = UniSparse(block_size=16, c_q=4, c_k=4, **rule, last_query_blocks=0)
    selection = selector.select(tokens, tokens, is_causal=is_causal)
    assert selection.keep.equal(selection.visible.expand_as(selection.keep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_that_overflow_keep_everything(dtype: torch.dtype) -> None:
    tokens = torch.full((1, 1, 70, 4), torch.finfo(dtype).max, dtype=dtype)
    selector = UniSparse(block_size=16, c_q=4, c_k=4, top_p=0.2, last_query_blocks=0)
    selection = selector.select(tokens, tokens, scale=1e38)
    assert selection.keep.all()


def test_values_are_not_checked_for_being_finite() -> None:
    key = torch.randn(1, 2, 40, 4)
    validate_value(key, torch.full((1, 2, 40, 7), float("nan")))
