"""XAttention against its definition: cells, their antidiagonals, top-p with the crossing block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks import TopP
from unisparse_flex.block_masks.scoring import compute_antidiagonal_scores, default_scale
from unisparse_flex.block_masks.selection import HeadTopP
from unisparse_flex.block_masks.selectors import XAttention

from . import oracle
from .baselines import SIZE, assert_keeps_what_is_defined, calls_of
from .strategies import HEAD_DIM, Call

HEADS = 4


def token_at(group: Tensor, index: int) -> Tensor:
    """A token of a group; one behind the end counts as the group's mean."""
    return group[index] if index < len(group) else group.mean(0)


def head_scores(query: Tensor, key: Tensor, call: Call) -> Tensor:
    size, stride = call.selector.block_size, call.selector.stride
    scores = torch.zeros(-(-call.q_len // size), -(-call.kv_len // size), dtype=torch.float64)
    for r, rows in enumerate(query.split(stride)):
        last_position = call.kv_len if call.offset is None else r * stride + len(rows) - 1
        last_position += call.offset or 0
        logits = []
        for c, keys in enumerate(key.split(stride)):
            if c * stride <= last_position:
                pairs = [
                    float(token_at(rows, stride - 1 - i) @ token_at(keys, i)) for i in range(stride)
                ]
                mean = sum(pairs) / stride / math.sqrt(HEAD_DIM)
                logits.append(mean + math.log(len(keys) / stride))
        for c, mass in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0)):
            scores[r * stride // size, c * stride // size] += len(rows) * mass
    return scores / scores.sum(-1, keepdim=True)


def top_p(
    share: float,
) -> Callable[[Sequence[float], Sequence[bool], Sequence[bool]], tuple[list[bool], float]]:
    return lambda scores, forced, visible: oracle.choose_row(scores, forced, visible, top_p=share)


@pytest.mark.parametrize(
    ("stride", "forced"),
    [(8, {}), (4, {"sink_blocks": 0, "last_query_blocks": 1}), (16, {"local_blocks": 2}), (1, {})],
)
def test_kept_blocks_equal_the_definition(stride: int, forced: dict[str, Any]) -> None:
    selector = XAttention(block_size=SIZE, stride=stride, top_p=0.7, **forced)
    for call in calls_of(selector)[:: 3 if stride == 1 else 1]:
        assert_keeps_what_is_defined(call, head_scores, top_p(0.7))


@pytest.mark.parametrize("length", [16, 48, 50])
def test_scores_equal_the_definition(length: int) -> None:
    call = replace(calls_of(XAttention(block_size=SIZE))[0], q_len=length, kv_len=length + 5)
    query, key = call.query_key()
    scores = compute_antidiagonal_scores(
        query, key, geometry=call.geometry, stride=8, scale=default_scale(HEAD_DIM)
    )
    expected = torch.stack([head_scores(query[1, h], key[1, h // 2], call) for h in range(HEADS)])
    torch.testing.assert_close(scores[1], expected, rtol=0, atol=1e-12)


def test_every_head_keeps_its_own_share() -> None:
    shares = (0.2, 0.5, 0.9, 1.0)
    selector = XAttention(block_size=SIZE, stride=4, head_top_p=shares)
    for call in calls_of(selector)[::5]:
        keep = call.keep()
        for head, share in enumerate(shares):
            alone = replace(call.selector, head_top_p=None, top_p=share)
            assert keep[:, head].equal(replace(call, selector=alone).keep()[:, head])


def test_a_share_for_every_head_is_top_p_for_each() -> None:
    scores = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    scores /= scores.sum(-1, keepdim=True)
    forced, visible = torch.zeros(5, 7).bool(), torch.ones(5, 7).bool()
    both = HeadTopP(top_p=(0.3, 0.8)).select(scores, forced, visible)
    for head, share in enumerate((0.3, 0.8)):
        alone = TopP(top_p=share).select(scores, forced, visible)
        assert both[:, head].equal(alone[:, head])


def test_shares_for_other_heads_are_refused() -> None:
    selector = XAttention(head_top_p=(0.5, 0.6))
    tokens = torch.randn(1, 3, 20, 4)
    with pytest.raises(ValueError, match="got 2 for 3 heads"):
        selector.select(tokens, tokens)
    with pytest.raises(ValueError, match="each of 3 heads, got 2"):
        HeadTopP(top_p=(0.5, 0.6)).select(torch.ones(1, 3, 1, 1), *torch.ones(2, 1, 1).bool())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"stride": 0}, ValueError),
        ({"stride": 24}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"head_top_p": (0.5, 1.5)}, ValueError),
        ({"head_top_p": ()}, TypeError),
        ({"head_top_p": [0.5]}, TypeError),
        ({"sink_blocks": -1}, ValueError),
    ],
    ids=str,
)
def test_wrong_values_are_named(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(wrong))):
        XAttention(**wrong)


def test_cost_speaks_of_cells_and_top_p() -> None:
    cost = XAttention(stride=16, head_top_p=(0.9, 0.9)).cost
    assert (cost.c_q, cost.c_k, cost.row_blocks) == (16, 16, 2)
    assert cost.share == pytest.approx(XAttention().cost.share)
    assert cost.share < XAttention(top_p=0.95).cost.share
