"""What is kept whatever the scores say, and what is never kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import BlockGeometry, ForcedBlocks, UniSparse

from . import oracle
from .strategies import Call, calls, lengths, offsets

CPU = torch.device("cpu")
LEAST = {"top_p": 1e-6, "top_k": None}


@settings(max_examples=40)
@given(calls())
def test_no_block_without_a_visible_pair_is_kept(call: Call) -> None:
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size)
    keep = call.keep()
    assert keep.shape[2:] == visible.shape
    assert not (keep & ~visible).any()


@settings(max_examples=40)
@given(calls(), st.integers(0, 2))
def test_every_query_row_has_a_key(call: Call, sinks: int) -> None:
    call = call.with_selector(**LEAST, sink_blocks=sinks, last_query_blocks=0)
    mask = call.select().token_mask()
    assert mask.shape[2:] == (call.q_len, call.kv_len)
    assert mask.any(-1).all()


@settings(max_examples=40)
@given(calls(causal=True))
def test_selection_never_drops_the_diagonal(call: Call) -> None:
    call = call.with_selector(**LEAST, sink_blocks=0, last_query_blocks=0)
    mask = call.select().token_mask()
    for row in range(call.q_len):
        assert mask[:, :, row, row + call.kv_len - call.q_len].all()


@settings(max_examples=30)
@given(calls(causal=False, square=True))
def test_selection_never_drops_the_diagonal_of_self_attention(call: Call) -> None:
    call = call.with_selector(**LEAST, sink_blocks=0, last_query_blocks=0)
    assert call.select().token_mask().diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("residue", range(16))
def test_every_offset_keeps_both_blocks_that_a_query_block_stands_on(residue: int) -> None:
    selector = UniSparse(block_size=16, c_q=4, c_k=4, top_p=1e-6, sink_blocks=0)
    for q_len in (1, 15, 16, 17, 33):
        query = torch.randn(1, 1, q_len, 4)
        key = torch.randn(1, 1, q_len + 32 + residue, 4)
        selection = selector.select(query, key, causal_lower_right=True)
        mask = selection.token_mask()[0, 0]
        assert mask.diagonal(32 + residue).all()
        assert not mask.triu(33 + residue).any()


@pytest.mark.parametrize("residue", range(16))
@pytest.mark.parametrize("q_len", [1, 15, 16, 17, 33])
def test_visible_and_full_blocks_are_exact_at_every_offset(q_len: int, residue: int) -> None:
    for kv_len in (16 + residue, 64):
        geometry = BlockGeometry(
            q_len=q_len, kv_len=kv_len, block_size=16, causal_offset=16 + residue
        )
        pairs = oracle.visible_pairs(q_len, kv_len, 16 + residue)
        assert geometry.visible_blocks(CPU).equal(oracle.any_in_block(pairs, 16))
        assert geometry.full_blocks(CPU).equal(oracle.all_in_block(pairs, 16))


@settings(max_examples=40)
@given(calls())
def test_selection_never_drops_the_sinks(call: Call) -> None:
    sinks = call.selector.sink_blocks
    selection = call.select()
    assert (call.keep() | ~selection.visible)[..., :sinks].all()


@settings(max_examples=40)
@given(calls())
def test_the_last_query_blocks_keep_all_they_see(call: Call) -> None:
    selection = call.select()
    first = max(0, call.geometry.num_q_blocks - call.selector.last_query_blocks)
    assert (call.keep() | ~selection.visible)[..., first:, :].all()


@settings(max_examples=40)
@given(calls())
def test_forced_blocks_equal_the_definition(call: Call) -> None:
    forced = call.selector.forced_blocks.locate(call.geometry, CPU)[0, 0]
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size)
    assert (forced & visible).equal(oracle.forced_blocks(call) & visible)


@settings(max_examples=30)
@given(calls(causal=False), st.integers(1, 3))
def test_cross_attention_has_no_diagonal_to_keep(call: Call, local_blocks: int) -> None:
    forced_blocks = ForcedBlocks(sink_blocks=0, local_blocks=local_blocks, last_query_blocks=0)
    forced = forced_blocks.locate(call.geometry, CPU)
    assert forced.any() == (call.q_len == call.kv_len)


@st.composite
def geometries(draw: st.DrawFn) -> BlockGeometry:
    """Any alignment, top-left with more queries than keys among them."""
    size = draw(st.sampled_from([16, 32, 64]))
    return BlockGeometry(
        q_len=draw(lengths(size)),
        kv_len=draw(lengths(size)),
        block_size=size,
        causal_offset=draw(st.none() | offsets(size)),
    )


@settings(max_examples=60)
@given(geometries())
def test_a_block_is_visible_where_any_pair_is(geometry: BlockGeometry) -> None:
    pairs = oracle.visible_pairs(geometry.q_len, geometry.kv_len, geometry.causal_offset)
    expected = oracle.any_in_block(pairs, geometry.block_size)
    assert geometry.visible_blocks(CPU).equal(expected)


@settings(max_examples=60)
@given(geometries())
def test_a_block_is_full_where_all_pairs_are_visible(geometry: BlockGeometry) -> None:
    pairs = oracle.visible_pairs(geometry.q_len, geometry.kv_len, geometry.causal_offset)
    expected = oracle.all_in_block(pairs, geometry.block_size)
    assert geometry.full_blocks(CPU).equal(expected)


@settings(max_examples=40)
@given(geometries())
def test_every_query_block_has_a_local_block_under_causality(geometry: BlockGeometry) -> None:
    local = geometry.local_blocks(1, CPU)
    causal_or_self = geometry.causal_offset is not None or geometry.q_len == geometry.kv_len
    assert local.any(-1).all() == causal_or_self
    assert not (local & ~geometry.visible_blocks(CPU)).any()


@settings(max_examples=30)
@given(calls(), st.data())
def test_token_mask_of_some_rows_is_a_slice_of_the_whole(call: Call, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, call.q_len - 1))
    stop = data.draw(st.integers(start + 1, call.q_len))
    selection = call.select()
    part = selection.token_mask(slice(start, stop))
    assert part.equal(selection.token_mask()[:, :, start:stop])
