"""UniSparse is a value, and half precision changes nothing but the tokens."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_flex.block_masks import (
    DEFAULT_SELECTOR,
    ForcedBlocks,
    Selector,
    TopK,
    TopP,
    UniSparse,
    compute_block_scores,
    kernels,
)
from unisparse_flex.block_masks.granularity import Pooled
from unisparse_flex.block_masks.selection import HeadThreshold, Threshold, TopPOrThreshold
from unisparse_flex.block_masks.selectors import selector_of_quality
from unisparse_flex.passes.calls import decode_selector

from .strategies import Call, calls, random_masks, selectors

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
ANY_SELECTOR = st.integers(1, 4).flatmap(lambda group: selectors(group=group))


@settings(max_examples=50)
@given(ANY_SELECTOR)
def test_repr_can_be_pasted_back(selector: UniSparse) -> None:
    assert eval(repr(selector), {"UniSparse": UniSparse}) == selector


@settings(max_examples=50)
@given(ANY_SELECTOR, ANY_SELECTOR)
def test_equal_selectors_have_equal_hashes(one: UniSparse, other: UniSparse) -> None:
    values = [tuple(getattr(s, field.name) for field in fields(s)) for s in (one, other)]
    assert (one == other) == (values[0] == values[1])
    assert one != other or hash(one) == hash(other)
    assert {one: "kept"}[eval(repr(one), {"UniSparse": UniSparse})] == "kept"


@pytest.mark.parametrize("name", [field.name for field in fields(UniSparse)])
def test_no_field_can_be_changed(name: str) -> None:
    selector = UniSparse()
    with pytest.raises(FrozenInstanceError):
        setattr(selector, name, 1)


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        UniSparse(128)  # type: ignore[call-arg]


def test_without_a_rule_it_is_the_default() -> None:
    rule = TopPOrThreshold(top_p=0.928, threshold=0.006, threshold_blocks=64)
    assert UniSparse() == DEFAULT_SELECTOR
    assert UniSparse().rule == rule
    assert UniSparse(block_size=32).rule == rule
    assert UniSparse(top_k=3).rule == TopK(top_k=3)
    assert UniSparse(top_k=3).top_p is None
    assert UniSparse(top_p=0.97).rule == TopP(top_p=0.97)


def test_composites_fit_the_block_by_default() -> None:
    sizes = {size: UniSparse(block_size=size) for size in (16, 64, 128, 256)}
    assert [(s.c_q, s.c_k, s.sampled_queries) for s in sizes.values()] == [
        (16, 16, 4),
        (16, 64, 4),
        (16, 128, 4),
        (16, 256, 4),
    ]


def test_the_papers_policy_has_a_name() -> None:
    paper = UniSparse.paper()
    assert (paper.c_q, paper.c_k, paper.sampled_queries) == (8, 8, 0)
    assert paper.rule == TopP(top_p=0.95)
    assert UniSparse.paper(top_k=3).rule == TopK(top_k=3)
    assert UniSparse.paper(threshold=None).rule == TopP(top_p=0.95)
    assert UniSparse.paper(block_size=64, top_p=0.9).rule == TopP(top_p=0.9)


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (UniSparse(), "UniSparse()"),
        (UniSparse(c_k=128, top_p=0.928, threshold=0.006, threshold_blocks=64), "UniSparse()"),
        (UniSparse(block_size=32, top_k=3), "UniSparse(block_size=32, top_k=3)"),
        (UniSparse(threshold=0.006), "UniSparse(threshold=0.006)"),
        (UniSparse(top_p=0.9, sink_blocks=0), "UniSparse(top_p=0.9, sink_blocks=0)"),
    ],
    ids=str,
)
def test_it_prints_what_differs_from_the_default(selector: UniSparse, text: str) -> None:
    assert repr(selector) == selector.text == text
    assert decode_selector(text) == selector


def test_what_was_written_with_every_field_is_read() -> None:
    text = (
        "UniSparse(block_size=128, c_q=8, c_k=8, c_h=1, top_p=0.95, top_k=None, threshold=None, "
        "sampled_queries=0, sink_blocks=1, local_blocks=1, last_query_blocks=1, "
        "head_thresholds=None, threshold_blocks=None)"
    )
    assert decode_selector(text) == UniSparse.paper()


@pytest.mark.parametrize(
    ("quality", "threshold"),
    [("fast", 0.014), ("balanced", 0.006), ("high", 0.002), (1, 0.006), (3.0, 0.002), (0.1, 0.06)],
)
def test_a_quality_is_a_threshold_of_the_default(quality: Any, threshold: float) -> None:
    expected = replace(DEFAULT_SELECTOR, threshold=threshold, top_p=round(1 - 12 * threshold, 4))
    assert selector_of_quality(quality) == expected


@pytest.mark.parametrize(
    ("quality", "error", "match"),
    [
        ("best", ValueError, "one of 'fast', 'balanced', 'high', or a number, got 'best'"),
        (0.05, ValueError, "at least 0.1, got 0.05"),
        (float("nan"), ValueError, "finite number"),
        (float("inf"), ValueError, "finite number"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_other_qualities_are_refused(quality: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        selector_of_quality(quality)


def test_a_higher_quality_keeps_more() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 2048, 32, generator=generator) for _ in range(2))
    # Some blocks of keys differ from others.
    key += torch.randn(1, 2, 16, 32, generator=generator).repeat_interleave(128, dim=2) * 2
    query += torch.randn(1, 2, 16, 32, generator=generator).repeat_interleave(128, dim=2)
    qualities = (0.2, "fast", "balanced", 2, "high", 10)
    keeps = [selector_of_quality(q).select(query, key, is_causal=True).keep for q in qualities]
    for fewer, more in pairwise(keeps):
        assert not (fewer & ~more).any()
    assert keeps[0].sum() < keeps[2].sum() < keeps[-1].sum()


def test_a_threshold_is_a_rule_of_its_own() -> None:
    selector = UniSparse(threshold=0.01)
    assert selector.rule == Threshold(threshold=0.01)
    assert selector.top_p is None
    assert selector.top_k is None


def test_thresholds_of_heads_are_a_rule_of_their_own() -> None:
    selector = UniSparse(head_thresholds=(0.01, 0.02))
    assert selector.rule == HeadThreshold(thresholds=(0.01, 0.02))
    assert selector.top_p is None
    both = UniSparse(head_thresholds=(0.01, 0.02), top_p=0.8)
    assert both.rule == HeadThreshold(thresholds=(0.01, 0.02), top_p=0.8)
    assert selector.cost.has_kernels


def test_the_density_of_heads_is_the_mean_of_theirs() -> None:
    def density(**rules: Any) -> float:
        cost = UniSparse(**rules).cost
        return cost.density(q_len=4096, kv_len=4096, block_size=128, is_causal=True)

    few, many = density(threshold=0.02), density(threshold=0.005)
    assert density(head_thresholds=(0.02, 0.02)) == pytest.approx(few)
    assert density(head_thresholds=(0.02, 0.005)) == pytest.approx((few + many) / 2)
    assert density(head_thresholds=(0.0, 0.0)) == 1.0


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_each_head_selects_as_with_its_threshold_for_all(top_p: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 100, 16, generator=generator) * 2 for heads in (4, 2))
    options: dict[str, Any] = {
        "block_size": 16,
        "c_q": 4,
        "c_k": 4,
        "sampled_queries": 2,
        "top_p": top_p,
    }
    thresholds = (0.3, 0.1, 0.02, 0.0)
    selector = UniSparse(**options, head_thresholds=thresholds)
    keep = selector.select(query, key, is_causal=True).keep
    for head, threshold in enumerate(thresholds[:3]):
        alone = UniSparse(**options, threshold=threshold).select(query, key, is_causal=True).keep
        assert keep[:, head].equal(alone[:, head])
    everything = UniSparse(block_size=16, top_p=1.0).select(query, key, is_causal=True).keep
    assert keep[:, 3].equal(everything[:, 3])


@pytest.mark.parametrize("by_kernels", [False, True])
def test_thresholds_of_heads_are_as_many_as_the_heads(
    by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_kernels:
        monkeypatch.setattr(kernels, "obstacle", lambda *_: None)
    query = torch.randn(1, 2, 256, 16)
    with pytest.raises(ValueError, match="one share for each of 2 heads, got 3"):
        UniSparse(head_thresholds=(0.1, 0.1, 0.1)).select(query, query, is_causal=True)


def test_a_threshold_and_a_top_p_are_one_rule() -> None:
    selector = UniSparse(threshold=0.01, top_p=0.8)
    assert selector.rule == TopPOrThreshold(top_p=0.8, threshold=0.01)


def test_the_blocks_of_a_threshold_reach_every_rule_that_has_one() -> None:
    options: Any = {"threshold_blocks": 64}
    alone = UniSparse(threshold=0.01, **options)
    assert alone.rule == Threshold(threshold=0.01, threshold_blocks=64)
    both = UniSparse(threshold=0.01, top_p=0.8, **options)
    assert both.rule == TopPOrThreshold(top_p=0.8, threshold=0.01, threshold_blocks=64)
    heads = UniSparse(head_thresholds=(0.01,), top_p=0.8, **options)
    assert heads.rule == HeadThreshold(thresholds=(0.01,), top_p=0.8, threshold_blocks=64)


def test_fields_reach_granularity_and_guards() -> None:
    selector = UniSparse(c_q=2, c_k=4, c_h=3, sink_blocks=5, local_blocks=6, last_query_blocks=7)
    assert selector.granularity == Pooled(q=2, k=4, heads=3)
    assert selector.forced_blocks == ForcedBlocks(
        sink_blocks=5, local_blocks=6, last_query_blocks=7
    )


def test_selectors_are_known_by_their_class_name() -> None:
    assert Selector.registry["UniSparse"] is UniSparse


@settings(max_examples=40)
@given(calls(), HALVES)
def test_half_precision_selects_as_its_float32_upcast(call: Call, dtype: torch.dtype) -> None:
    query, key = (tokens.to(dtype) for tokens in call.query_key())
    assert call.keep(query, key).equal(call.keep(query.float(), key.float()))


@settings(max_examples=30)
@given(calls(), HALVES)
def test_half_precision_scores_equal_those_of_its_float32_upcast(
    call: Call, dtype: torch.dtype
) -> None:
    query, key = (tokens.to(dtype) for tokens in call.query_key())
    options: dict[str, Any] = {
        "geometry": call.geometry,
        "granularity": call.selector.granularity,
        "scale": 0.5,
    }
    scores = compute_block_scores(query, key, **options)
    assert scores.dtype == torch.float32
    assert scores.equal(compute_block_scores(query.float(), key.float(), **options))


@settings(max_examples=20)
@given(calls(causal=False), HALVES, st.data())
def test_half_precision_under_a_mask_selects_as_its_float32_upcast(
    call: Call, dtype: torch.dtype, data: st.DataObject
) -> None:
    query, key = (tokens.to(dtype) for tokens in call.query_key())
    mask = data.draw(random_masks(call))
    half = call.select(query, key, attn_mask=mask)
    assert half.keep.equal(call.select(query.float(), key.float(), attn_mask=mask).keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_half_precision_loses_nothing(dtype: torch.dtype) -> None:
    # 64 + 2**-k vanishes in a half-precision sum of 64 tokens.
    key = torch.zeros(1, 1, 4 * 64, 4, dtype=dtype)
    key[:, :, 2 * 64 : 3 * 64] = 1.0
    key[:, :, 2 * 64] += 2.0**-7
    key[:, :, 64 : 2 * 64] = 1.0
    selector = UniSparse(block_size=64, c_q=64, c_k=64, top_k=1, sink_blocks=0, last_query_blocks=0)
    query = torch.ones(1, 1, 64, 4, dtype=dtype)
    assert selector.select(query, key).keep.flatten().tolist() == [False, False, True, False]
