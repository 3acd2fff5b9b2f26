"""FlashPrefill against its definition: every query, pooled keys, a share of the row's maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks.selection import ForcedBlocks, RowMax
from unisparse_flex.block_masks.selectors import FlashPrefill

from .baselines import SIZE, assert_keeps_what_is_defined, calls_of
from .strategies import HEAD_DIM, Call

ALPHA = 0.4


def head_scores(query: Tensor, key: Tensor, call: Call) -> Tensor:
    size = call.selector.block_size
    means = [keys.mean(0) for keys in key.split(size)]
    counts = [len(keys) for keys in key.split(size)]
    scores = torch.zeros(-(-call.q_len // size), len(means), dtype=torch.float64)
    for i, rows in enumerate(query.split(size)):
        logits: dict[tuple[int, int], float] = {}
        for r, row in enumerate(rows):
            for j, mean in enumerate(means):
                if call.offset is None or j * size <= i * size + r + call.offset:
                    logits[r, j] = float(row @ mean) / math.sqrt(HEAD_DIM) + math.log(counts[j])
        peak = max(logits.values())
        for (_, j), logit in logits.items():
            scores[i, j] += math.exp(logit - peak)
    return scores


def choose(
    scores: Sequence[float], forced: Sequence[bool], visible: Sequence[bool]
) -> tuple[list[bool], float]:
    least = ALPHA * max(scores)
    columns = zip(scores, forced, visible, strict=True)
    kept = [v and (f or score >= least) for score, f, v in columns]
    return kept, min(abs(score - least) for score in scores) / max(scores)


@pytest.mark.parametrize(
    "forced",
    [{}, {"sink_blocks": 0, "local_blocks": 1, "last_query_blocks": 0}, {"local_blocks": 1}],
    ids=str,
)
def test_kept_blocks_equal_the_definition(forced: dict[str, int]) -> None:
    for call in calls_of(FlashPrefill(block_size=SIZE, alpha=ALPHA, **forced)):
        assert_keeps_what_is_defined(call, head_scores, choose)


def test_defaults_are_those_of_its_authors() -> None:
    selector = FlashPrefill()
    assert selector.rule == RowMax(alpha=0.1)
    expected = ForcedBlocks(sink_blocks=2, local_blocks=4, last_query_blocks=2)
    assert selector.forced_blocks == expected
    assert (selector.cost.c_q, selector.cost.c_k) == (1, 128)


def test_equal_scores_are_all_kept() -> None:
    selector = FlashPrefill(
        block_size=SIZE, alpha=1.0, sink_blocks=0, local_blocks=1, last_query_blocks=0
    )
    keep = selector.select(torch.ones(1, 2, 40, 4), torch.ones(1, 1, 96, 4)).keep
    assert keep.all()


def test_a_block_of_fewer_keys_holds_less() -> None:
    selector = FlashPrefill(
        block_size=SIZE, alpha=0.5, sink_blocks=0, local_blocks=1, last_query_blocks=0
    )
    for left in range(1, SIZE + 1):
        keep = selector.select(torch.ones(1, 1, 40, 4), torch.ones(1, 1, 48 + left, 4)).keep
        assert keep[..., :3].all()
        assert keep[..., 3].all() == (left >= SIZE / 2)


def test_a_row_of_zeros_keeps_what_is_forced_alone() -> None:
    scores = torch.zeros(1, 1, 2, 3)
    forced = torch.tensor([[True, False, False], [False, True, False]])
    visible = torch.tensor([[True, True, True], [True, True, False]])
    assert RowMax(alpha=0.5).select(scores, forced, visible)[0, 0].equal(forced & visible)


def test_what_is_not_visible_sets_no_maximum() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 100.0]]]])
    visible = torch.tensor([[True, True, False]])
    keep = RowMax(alpha=0.5).select(scores, torch.zeros(1, 3).bool(), visible)
    assert keep.flatten().tolist() == [True, True, False]


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"alpha": 1.1}, {"local_blocks": 0}, {"block_size": 8}], ids=str
)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FlashPrefill(**wrong)
