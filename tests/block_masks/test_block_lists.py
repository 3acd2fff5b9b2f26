"""Lists of blocks and the blocks themselves say the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import BlockSelection
from unisparse_flex.block_masks.block_lists import BlockLists

from .strategies import Call, calls


@settings(max_examples=40)
@given(calls(), st.booleans())
def test_listed_blocks_are_the_kept_ones(call: Call, partial_only: bool) -> None:
    selection = call.select()
    lists = BlockLists(*selection.block_lists(partial_only=partial_only))
    assert lists.kept().equal(selection.keep)


@settings(max_examples=40)
@given(calls())
def test_a_selection_hands_out_the_lists_that_it_was_given(call: Call) -> None:
    selection = call.select()
    lists = BlockLists(*selection.block_lists())
    given_lists = BlockSelection(
        keep=lists.kept(), visible=selection.visible, geometry=selection.geometry, lists=lists
    )
    for one, other in zip(given_lists.block_lists(), lists.tensors(), strict=True):
        assert one is other
    partial = BlockLists(*given_lists.block_lists(partial_only=True))
    assert partial.kept().equal(selection.keep)
    assert not partial.full_kv_num_blocks.any()


@settings(max_examples=30)
@given(calls(), st.integers(-(2**31), 2**31 - 1))
def test_what_lies_behind_a_count_says_nothing(call: Call, garbage: int) -> None:
    selection = call.select()
    tensors = [tensor.clone() for tensor in selection.block_lists()]
    for counts, indices in (tensors[:2], tensors[2:]):
        behind = torch.arange(indices.shape[-1]) >= counts[..., None]
        indices.masked_fill_(behind, garbage)
    assert BlockLists(*tensors).kept().equal(selection.keep)


def test_empty_lists_keep_nothing() -> None:
    counts, indices = torch.zeros(1, 2, 3).int(), torch.zeros(1, 2, 3, 4).int()
    assert not BlockLists(counts, indices, counts, indices).kept().any()
