"""Top-p and top-k choose what an exhaustive reading of their definition chooses."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import TopK, TopP, compute_block_scores
from unisparse_flex.block_masks.scoring import default_scale
from unisparse_flex.block_masks.selection import HeadThreshold, Threshold, TopPOrThreshold

from . import oracle
from .strategies import HEAD_DIM, Call, calls

BLOCKS = 8


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], list[bool], list[bool]]:
    """Scores of one row in whole 64ths, so that sums are exact and ties frequent."""
    flags = st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS)
    visible = draw(flags)
    forced = [a and b for a, b in zip(draw(flags), visible, strict=True)]
    parts = draw(st.lists(st.integers(0, 64), min_size=BLOCKS - 1, max_size=BLOCKS - 1))
    cuts = [0, *sorted(parts), 64]
    shares = [(high - low) / 64 for low, high in pairwise(cuts)]
    return [s if v else 0.0 for s, v in zip(shares, visible, strict=True)], forced, visible


def as_row(values: list[float] | list[bool]) -> torch.Tensor:
    return torch.tensor(values)[None, None, None]


@settings(max_examples=200)
@given(rows(), st.integers(1, 64))
def test_top_p_equals_the_definition_on_exact_sums(
    row: tuple[list[float], list[bool], list[bool]], sixty_fourths: int
) -> None:
    scores, forced, visible = row
    top_p = sixty_fourths / 64
    expected, _ = oracle.choose_row(scores, forced, visible, top_p=top_p)
    chosen = TopP(top_p=top_p).select(as_row(scores), as_row(forced), as_row(visible))
    assert chosen[0, 0, 0].tolist() == expected


@settings(max_examples=200)
@given(rows(), st.integers(1, BLOCKS + 2))
def test_top_k_equals_the_definition(
    row: tuple[list[float], list[bool], list[bool]], top_k: int
) -> None:
    scores, forced, visible = row
    expected, _ = oracle.choose_row(scores, forced, visible, top_k=top_k)
    chosen = TopK(top_k=top_k).select(as_row(scores), as_row(forced), as_row(visible))
    assert chosen[0, 0, 0].tolist() == expected


@settings(max_examples=200)
@given(rows(), st.integers(1, 64))
def test_a_threshold_keeps_what_reaches_it(
    row: tuple[list[float], list[bool], list[bool]], sixty_fourths: int
) -> None:
    scores, forced, visible = row
    least = sixty_fourths / 64
    chosen = Threshold(threshold=least).select(as_row(scores), as_row(forced), as_row(visible))
    expected = [v and (f or s >= least) for s, f, v in zip(scores, forced, visible, strict=True)]
    if not any(expected):
        highest = max((s for s, v in zip(scores, visible, strict=True) if v), default=0.0)
        expected = [v and s == highest for s, v in zip(scores, visible, strict=True)]
    assert chosen[0, 0, 0].tolist() == expected


@settings(max_examples=200)
@given(rows(), st.integers(1, 64), st.integers(1, 64))
def test_top_p_or_threshold_keeps_what_either_does(
    row: tuple[list[float], list[bool], list[bool]], share: int, least: int
) -> None:
    scores, forced, visible = (as_row(values) for values in row)
    chosen = TopPOrThreshold(top_p=share / 64, threshold=least / 64)
    mass = TopP(top_p=share / 64).select(scores, forced, visible)
    high = (scores >= least / 64) & visible
    assert chosen.select(scores, forced, visible).equal(mass | high)


@settings(max_examples=200)
@given(rows(), st.integers(1, 64), st.integers(1, 64), st.integers(1, 20))
def test_a_threshold_falls_with_the_root_of_the_visible_blocks(
    row: tuple[list[float], list[bool], list[bool]], share: int, least: int, stated: int
) -> None:
    scores, forced, visible = row
    reached = least / 64 * math.sqrt(stated / max(sum(visible), 1))
    assume(all(abs(score - reached) > 1e-6 for score in scores))
    blocks = as_row(scores), as_row(forced), as_row(visible)
    high = [v and (f or s >= reached) for s, f, v in zip(scores, forced, visible, strict=True)]
    both = TopPOrThreshold(top_p=share / 64, threshold=least / 64, threshold_blocks=stated)
    mass = TopP(top_p=share / 64).select(*blocks)
    assert both.select(*blocks).equal(mass | as_row(high))
    if any(high):
        alone = Threshold(threshold=least / 64, threshold_blocks=stated)
        of_heads = HeadThreshold(thresholds=(least / 64,), threshold_blocks=stated)
        assert alone.select(*blocks)[0, 0, 0].tolist() == high
        assert of_heads.select(*blocks)[0, 0, 0].tolist() == high


def test_a_row_of_the_stated_blocks_has_the_stated_threshold() -> None:
    scores = torch.tensor([[0.6, 0.4, 0, 0], [0.5, 0.2, 0.2, 0.1]])[None, None]
    visible, forced = scores > 0, torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    kept = Threshold(threshold=0.3, threshold_blocks=4).select(scores, forced, visible)
    # 0.3 for four blocks, 0.42 for two.
    assert kept[0, 0].tolist() == [[True, False, False, False], [True, False, False, False]]
    kept = Threshold(threshold=0.3).select(scores, forced, visible)
    assert kept[0, 0, 0].tolist() == [True, True, False, False]
    kept = Threshold(threshold=0.3, threshold_blocks=2).select(scores, forced, visible)
    # 0.3 for two blocks, 0.21 for four.
    assert kept[0, 0].tolist() == [[True, True, False, False], [True, False, False, False]]


@settings(max_examples=30)
@given(calls(), st.floats(0.01, 1.0))
def test_a_threshold_selects_the_blocks_that_the_definition_scores_so(
    call: Call, least: float
) -> None:
    call = call.with_selector(top_p=None, top_k=None, threshold=least)
    scores = oracle.block_scores(call)
    assume((scores - least).abs().min() > 1e-9)
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size)
    expected = ((scores >= least) | oracle.forced_blocks(call)) & visible
    highest = scores.masked_fill(~visible, -1.0)
    highest = (highest > highest.amax(-1, keepdim=True) - 1e-9) & visible
    expected = torch.where(expected.any(-1, keepdim=True), expected, highest)
    assert call.keep().equal(oracle.per_query_head(expected, call))


@settings(max_examples=30)
@given(calls(), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_smaller_threshold_keeps_every_block_of_a_larger_one(
    call: Call, one: float, other: float
) -> None:
    few, many = (
        call.with_selector(top_p=None, top_k=None, threshold=t).keep()
        for t in sorted((one, other), reverse=True)
    )
    assert not (few & ~many).any()


@settings(max_examples=40)
@given(calls())
def test_selection_equals_the_definition_on_the_librarys_scores(call: Call) -> None:
    scores = compute_block_scores(
        *call.query_key(),
        geometry=call.geometry,
        granularity=call.selector.granularity,
        scale=default_scale(HEAD_DIM),
    )
    expected, margin = oracle.choose(scores, call)
    assume(margin > 1e-9)
    assert call.keep().equal(oracle.per_query_head(expected, call))


@settings(max_examples=30)
@given(calls(rules=("top_p",)))
def test_selection_equals_the_definition_from_tokens_to_blocks(call: Call) -> None:
    expected, margin = oracle.choose(oracle.block_scores(call), call)
    assume(margin > 1e-9)
    assert call.keep().equal(oracle.per_query_head(expected, call))


@settings(max_examples=40)
@given(calls(rules=("top_p",)), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_a_larger_top_p_keeps_every_block_of_a_smaller_one(
    call: Call, one: float, other: float
) -> None:
    small, large = (call.with_rule(top_p=p).keep() for p in sorted((one, other)))
    assert not (small & ~large).any()


@settings(max_examples=40)
@given(calls(rules=("top_k",)), st.integers(1, 6), st.integers(1, 6))
def test_a_larger_top_k_keeps_every_block_of_a_smaller_one(
    call: Call, one: int, other: int
) -> None:
    small, large = (call.with_rule(top_k=k).keep() for k in sorted((one, other)))
    assert not (small & ~large).any()


@settings(max_examples=40)
@given(calls(rules=("top_k",)))
def test_top_k_keeps_k_blocks_where_that_many_are_visible(call: Call) -> None:
    top_k = call.selector.top_k
    assert top_k is not None
    selection = call.select()
    visible = selection.visible.expand_as(selection.keep)
    forced = oracle.forced_blocks(call) & visible
    expected = visible.sum(-1).minimum(forced.sum(-1).clamp_min(top_k))
    assert selection.keep.sum(-1).equal(expected)


@settings(max_examples=40)
@given(calls())
def test_top_p_of_one_keeps_every_visible_block(call: Call) -> None:
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size)
    assert call.with_rule(top_p=1.0).keep().equal(visible.expand(call.batch, call.q_heads, -1, -1))


@settings(max_examples=20)
@given(calls())
def test_attention_over_top_p_of_one_is_dense_attention(call: Call) -> None:
    query, key = call.query_key()
    value = torch.randn(key.shape, dtype=key.dtype, generator=call.generator())
    mask = call.with_rule(top_p=1.0).select().token_mask()
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    sparse = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=pairs, enable_gqa=True)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(calls())
def test_density_is_kept_over_visible(call: Call) -> None:
    selection = call.select()
    keep = selection.keep.expand(-1, call.q_heads, -1, -1)
    visible = selection.visible.expand_as(keep)
    assert abs(selection.density() - (keep.sum() / visible.sum()).item()) < 1e-6
    assert 0 < selection.density() <= 1
