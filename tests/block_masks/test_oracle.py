"""Oracle keeps the blocks that hold the mass of dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks.selectors import Oracle

from . import oracle
from .baselines import SIZE, assert_keeps_what_is_defined, calls_of, rows_seen
from .strategies import HEAD_DIM, Call

TOP_P = 0.8


def head_scores(query: Tensor, key: Tensor, call: Call) -> Tensor:
    size = call.selector.block_size
    scores = torch.zeros(-(-call.q_len // size), -(-call.kv_len // size), dtype=torch.float64)
    for row in range(call.q_len):
        seen = key[: rows_seen(call, row)]
        weights = (seen @ query[row] / HEAD_DIM**0.5).softmax(0)
        for j, part in enumerate(weights.split(size)):
            scores[row // size, j] += part.sum()
    return scores / scores.sum(-1, keepdim=True)


def choose(
    scores: Sequence[float], forced: Sequence[bool], visible: Sequence[bool]
) -> tuple[list[bool], float]:
    return oracle.choose_row(scores, forced, visible, top_p=TOP_P)


@pytest.mark.parametrize(
    "forced", [{}, {"sink_blocks": 1, "local_blocks": 2, "last_query_blocks": 1}], ids=str
)
def test_kept_blocks_equal_the_definition(forced: dict[str, int]) -> None:
    for call in calls_of(Oracle(block_size=SIZE, top_p=TOP_P, **forced)):
        assert_keeps_what_is_defined(call, head_scores, choose)


def test_a_single_key_that_stands_out_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.ones(1, 1, 32, 4)
    key = 0.1 * torch.randn(1, 1, 128, 4, generator=generator)
    key[:, :, 77] = 10.0
    keep = Oracle(block_size=SIZE, top_p=0.9).select(query, key).keep
    assert keep[..., 4].all()
    assert keep.sum() == 2


def test_a_row_that_a_mask_hides_has_no_say() -> None:
    query, key = torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 48, 4)
    key[:, :, 16:32] = 5.0
    query[:, :, :4] = 1.0
    query[:, :, 4:] = -1.0
    mask = torch.ones(16, 48, dtype=torch.bool)
    mask[4:] = False
    keep = Oracle(block_size=SIZE, top_p=0.9).select(query, key, attn_mask=mask).keep
    assert keep.flatten().tolist() == [False, True, False]


def test_cost_is_that_of_every_pair() -> None:
    assert (Oracle().cost.c_q, Oracle().cost.c_k) == (1, 1)


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"sink_blocks": -1}, {"block_size": 8}], ids=str)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Oracle(**wrong)
