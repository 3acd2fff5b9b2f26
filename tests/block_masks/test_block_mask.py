"""A BlockMask says exactly what its selection says, to stock FlexAttention too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unisparse_flex.block_masks import (
    DEFAULT_SELECTOR,
    UniSparse,
    causal_mask_mod,
    create_block_mask,
    selection_mask_mod,
    to_block_mask,
)

from . import oracle
from .strategies import Call, calls, random_masks

ignore_uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def create(call: Call, attn_mask: Tensor | None = None) -> BlockMask:
    return create_block_mask(
        *call.query_key(),
        causal_lower_right=call.causal,
        attn_mask=attn_mask,
        selector=call.selector,
    )


def uncompiled_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask
) -> Tensor:
    # Uncompiled flex still traces itself, and stops after a few calls of different shapes.
    torch.compiler.reset()
    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)


def evaluate(block_mask: BlockMask, call: Call) -> Tensor:
    """``mask_mod`` at every point: bool [B, Hq, Sq, Skv]."""
    shape = (call.batch, call.q_heads, call.q_len, call.kv_len)
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return block_mask.mask_mod(b, h, q, k)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """A block map from lists, by a loop; also checks that the lists ascend."""
    blocks = torch.zeros_like(indices, dtype=torch.int64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        row = indices[tuple(place)][: counts[tuple(place)]].tolist()
        assert row == sorted(set(row))
        for column in row:
            blocks[(*place, column)] += 1
    return blocks


@settings(max_examples=30)
@given(calls())
def test_to_dense_gives_the_kept_blocks_back(call: Call) -> None:
    block_mask, keep = create(call), call.select().keep
    assert block_mask.to_dense().bool().equal(keep)
    assert block_mask.shape == (call.batch, keep.shape[1], call.q_len, call.kv_len)
    size = call.selector.block_size
    assert (size, size) == block_mask.BLOCK_SIZE


@settings(max_examples=20)
@given(calls(), st.booleans())
def test_each_kept_block_stands_in_exactly_one_list(call: Call, partial_only: bool) -> None:
    selection = call.select()
    lists = selection.block_lists(partial_only=partial_only)
    assert all(part.dtype == torch.int32 for part in lists)
    partial, full = listed(*lists[:2]), listed(*lists[2:])
    assert (partial + full).equal(selection.keep.long())
    if partial_only:
        assert not full.any()


@settings(max_examples=20)
@given(calls())
def test_full_blocks_are_those_that_are_visible_everywhere(call: Call) -> None:
    selection = call.select()
    full = listed(*selection.block_lists()[2:]).bool()
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    whole = oracle.all_in_block(pairs, call.selector.block_size)
    assert full.equal(selection.keep & whole)


@settings(max_examples=20)
@given(calls())
def test_query_lists_are_the_transposed_key_lists(call: Call) -> None:
    block_mask = create(call)
    for name in ("", "full_"):
        keys = listed(
            getattr(block_mask, f"{name}kv_num_blocks"), getattr(block_mask, f"{name}kv_indices")
        )
        queries = listed(
            getattr(block_mask, f"{name}q_num_blocks"), getattr(block_mask, f"{name}q_indices")
        )
        assert queries.equal(keys.transpose(-1, -2))


@settings(max_examples=20)
@given(calls())
def test_mask_mod_is_the_token_mask(call: Call) -> None:
    expected = call.select().token_mask().expand(-1, call.q_heads, -1, -1)
    assert evaluate(create(call), call).equal(expected)


@settings(max_examples=20)
@given(calls(causal=False), st.data())
def test_mask_mod_adds_the_attn_mask(call: Call, data: st.DataObject) -> None:
    attn_mask = data.draw(random_masks(call))
    block_mask = create(call, attn_mask)
    selection = call.select(attn_mask=attn_mask)
    expected = (selection.token_mask() & attn_mask).expand(
        call.batch, call.q_heads, call.q_len, call.kv_len
    )
    assert evaluate(block_mask, call).equal(expected)
    assert block_mask.full_kv_num_blocks is not None
    assert not block_mask.full_kv_num_blocks.any()


@settings(max_examples=20)
@given(calls())
def test_inside_kept_blocks_causality_is_all_that_mask_mod_says(call: Call) -> None:
    selection = call.select()
    lean = to_block_mask(selection, causal_mask_mod(selection.geometry), compute_q_blocks=False)
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    assert evaluate(lean, call).logical_and(pairs).equal(evaluate(lean, call))
    assert (evaluate(lean, call) | ~pairs).all()
    assert lean.q_indices is None


@ignore_uncompiled
@settings(max_examples=6)
@given(calls())
def test_stock_flex_attention_attends_to_the_token_mask(call: Call) -> None:
    query, key = call.query_key()
    value = torch.randn(key.shape, dtype=key.dtype, generator=call.generator())
    flex = uncompiled_flex_attention(query, key, value, create(call))
    mask = call.select().token_mask()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(flex, expected, rtol=0, atol=1e-12)


@ignore_uncompiled
@settings(max_examples=6)
@given(calls(causal=False), st.data())
def test_stock_flex_attention_attends_to_the_attn_mask_too(call: Call, data: st.DataObject) -> None:
    attn_mask = data.draw(random_masks(call))
    query, key = call.query_key()
    value = torch.randn(key.shape, dtype=key.dtype, generator=call.generator())
    flex = uncompiled_flex_attention(query, key, value, create(call, attn_mask))
    mask = call.select(attn_mask=attn_mask).token_mask() & attn_mask
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(flex, expected, rtol=0, atol=1e-12)


@ignore_uncompiled
@settings(max_examples=6)
@given(calls())
def test_stock_flex_attention_over_top_p_of_one_is_dense(call: Call) -> None:
    query, key = call.query_key()
    flex = uncompiled_flex_attention(query, key, key, create(call.with_rule(top_p=1.0)))
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    dense = F.scaled_dot_product_attention(query, key, key, attn_mask=pairs, enable_gqa=True)
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-12)


def test_selector_defaults_to_the_one_that_is_named_so() -> None:
    query, key = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
    default = create_block_mask(query, key, is_causal=True)
    named = create_block_mask(query, key, is_causal=True, selector=DEFAULT_SELECTOR)
    assert default.to_dense().equal(named.to_dense())
    assert default.BLOCK_SIZE == (128, 128)


def test_mask_mod_follows_a_selection_that_heads_share() -> None:
    selector = UniSparse(block_size=16, c_q=4, c_k=4, c_h=2, top_p=0.3)
    selection = selector.select(torch.randn(1, 2, 64, 4), torch.randn(1, 1, 64, 4))
    assert selection.keep.shape[1] == 1
    mask_mod = selection_mask_mod(selection)
    first, second = (mask_mod(*map(torch.tensor, (0, head, 63, 0))) for head in (0, 1))
    assert first.equal(second)
