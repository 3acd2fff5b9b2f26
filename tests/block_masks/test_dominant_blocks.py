"""A block that holds the attention is found; equal blocks are taken from the left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import Selector, UniSparse

from .baselines import BY_SCORES, calls_of, name
from .strategies import HEAD_DIM, Call, calls

STRENGTH = 8.0
BLOCKS = 8
SIZE = 16


def plant(call: Call, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and one direction that query block i and key block j share."""
    generator = call.generator()
    query, key = (torch.randn(t.shape, generator=generator).double() for t in call.query_key())
    direction = torch.nn.functional.normalize(
        torch.randn(HEAD_DIM, dtype=torch.float64, generator=generator), dim=0
    )
    size = call.selector.block_size
    query[:, :, i * size : (i + 1) * size] += STRENGTH * direction
    key[:, :, j * size : (j + 1) * size] += STRENGTH * direction
    return query, key


@settings(max_examples=60)
@given(calls(), st.sampled_from([{"top_p": 0.5}, {"top_k": 3}]), st.data())
def test_a_planted_block_is_selected(
    call: Call, rule: dict[str, float], data: st.DataObject
) -> None:
    call = call.with_selector(
        sink_blocks=0, local_blocks=1, last_query_blocks=0, **{"top_p": None, "top_k": None, **rule}
    )
    i = data.draw(st.integers(0, call.geometry.num_q_blocks - 1))
    visible = call.geometry.visible_blocks(torch.device("cpu"))[i].nonzero().flatten().tolist()
    j = data.draw(st.sampled_from(visible))
    assert call.keep(*plant(call, i, j))[:, :, i, j].all()


@pytest.mark.parametrize("selector", BY_SCORES, ids=name)
def test_every_selector_by_scores_selects_a_planted_block(selector: Selector) -> None:
    for call in calls_of(selector)[::2]:
        visible = call.geometry.visible_blocks(torch.device("cpu"))
        for i, j in visible.nonzero().tolist():
            assert call.keep(*plant(call, i, j))[:, :, i, j].all()


@pytest.mark.parametrize("column", range(BLOCKS))
def test_one_hot_logits_keep_that_block_and_the_forced_ones(column: int) -> None:
    selector = UniSparse(
        block_size=SIZE, c_q=4, c_k=4, top_p=0.9, sink_blocks=1, last_query_blocks=0
    )
    query = torch.ones(1, 2, 3 * SIZE, 4, dtype=torch.float64)
    key = torch.zeros(1, 1, BLOCKS * SIZE, 4, dtype=torch.float64)
    key[:, :, column * SIZE : (column + 1) * SIZE] = 100.0
    expected = torch.zeros(1, 2, 3, BLOCKS, dtype=torch.bool)
    expected[..., 0] = True
    expected[..., column] = True
    assert selector.select(query, key).keep.equal(expected)


@pytest.mark.parametrize("kept", range(1, BLOCKS + 1))
@pytest.mark.parametrize("rule", ["top_p", "top_k"])
def test_constant_logits_keep_the_lowest_blocks(rule: str, kept: int) -> None:
    share = {"top_p": kept / BLOCKS} if rule == "top_p" else {"top_k": kept}
    selector = UniSparse(block_size=SIZE, c_q=4, c_k=4, **share, sink_blocks=0, last_query_blocks=0)
    query = torch.ones(2, 2, 3 * SIZE, 4)
    keep = selector.select(query, torch.ones(2, 1, BLOCKS * SIZE, 4)).keep
    assert keep.equal((torch.arange(BLOCKS) < kept).expand(2, 2, 3, BLOCKS))


@pytest.mark.parametrize("top_k", range(1, BLOCKS + 1))
def test_constant_logits_keep_the_diagonal_and_then_the_lowest_blocks(top_k: int) -> None:
    selector = UniSparse(
        block_size=SIZE, c_q=4, c_k=4, top_k=top_k, sink_blocks=0, last_query_blocks=0
    )
    tokens = torch.zeros(1, 1, BLOCKS * SIZE, 4)
    keep = selector.select(tokens, tokens, is_causal=True).keep[0, 0]
    for i in range(BLOCKS):
        lowest = [j for j in range(i) if j < top_k - 1]
        assert keep[i].nonzero().flatten().tolist() == [*lowest, i]


def test_ties_in_real_scores_go_to_the_lower_block() -> None:
    selector = UniSparse(block_size=SIZE, c_q=8, c_k=8, top_k=3, sink_blocks=0, last_query_blocks=0)
    query = torch.randn(1, 1, SIZE, 4).repeat(1, 1, 3, 1)
    strong, weak = 4 * query[:, :, :SIZE], torch.zeros(1, 1, SIZE, 4)
    key = torch.cat([weak, strong, weak, strong, weak, strong, strong, weak], dim=2)
    keep = selector.select(query, key).keep
    assert keep.equal(torch.tensor([0, 1, 0, 1, 0, 1, 0, 0]).bool().expand(1, 1, 3, BLOCKS))


@settings(max_examples=30)
@given(calls(causal=False, rules=("top_k",)), st.permutations(range(4)))
def test_permuting_key_blocks_permutes_the_selection(call: Call, order: list[int]) -> None:
    size = call.selector.block_size
    call = replace(call, kv_len=4 * size, q_len=2 * size + 1).with_selector(sink_blocks=0)
    query, key = call.query_key()
    permuted = key.unflatten(2, (4, size))[:, :, order].flatten(2, 3)
    assert call.keep(query, permuted).equal(call.keep()[..., order])
