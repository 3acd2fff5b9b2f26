"""Rows whose logits lie far apart: the kernels' lists are still those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .calls import (
    CPU,
    KernelCall,
    assert_selects,
    fixed_call,
    kernel_calls,
    run,
    tolerance_of,
    widen,
)
from .interpreter import Kernels

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}:RuntimeWarning")
    for warning in (
        "overflow encountered",
        "invalid value encountered",
        "divide by zero encountered",
        "All-NaN slice encountered",
    )
]

# The default counts of programs never split calls this short.
PROGRAMS = (1, 10**6)
DEVIATIONS = (1.0, 20.0, 59.0, 200.0, 1000.0)


def assert_wide_selects(
    kernels: Kernels, call: KernelCall, query: Tensor, key: Tensor, programs: int
) -> Tensor:
    """Asserts `assert_selects` of a call in as many programs; the blocks kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.score, "PROGRAMS_WANTED", programs)
        patch.setattr(kernels.score, "PROGRAMS_WANTED_OF_KEYS", programs)
        lists = run(kernels, call, query, key)
    assert_selects(call, lists, query, key, tolerance_of(call, query, key))
    return lists.kept()


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_wide_logits_select_as_the_reference(
    kernels: Kernels, deviation: float, is_causal: bool, dtype: torch.dtype, programs: int
) -> None:
    rule: dict[str, Any] = {"top_p": 0.6, "threshold": 0.05}
    call = fixed_call(
        20, 200, causal=is_causal, c_k=1, group=1, sampled_queries=2, dtype=dtype, **rule
    )
    query, key = widen(call, deviation)
    kept = assert_wide_selects(kernels, call, query, key, programs)
    if deviation >= 59:
        visible = call.geometry.visible_blocks(CPU).sum()
        assert kept.sum() < 0.5 * visible


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize(
    "granularity",
    [
        {"c_k": 1, "kv_len": 200},
        {"c_k": 4, "kv_len": 1150},
        {"c_q": 16, "c_k": 16, "kv_len": 200, "sampled_queries": 2},
    ],
    ids=["keys", "composites", "both"],
)
@pytest.mark.parametrize("part", [0.0, 0.4, 0.9])
def test_the_highest_logits_may_stand_anywhere(
    kernels: Kernels, part: float, granularity: dict[str, Any], programs: int
) -> None:
    call = fixed_call(16, threshold=0.02, group=1, dtype=torch.bfloat16, **granularity)
    query, key = widen(call, 200.0, 16, int(part * call.geometry.num_kv_blocks))
    kept = assert_wide_selects(kernels, call, query, key, programs)
    assert kept.sum() < 0.5 * call.geometry.visible_blocks(CPU).sum()


@pytest.mark.parametrize("part", [0.0, 0.9])
def test_the_lowest_logits_may_stand_anywhere(kernels: Kernels, part: float) -> None:
    call = fixed_call(16, 200, c_k=1, threshold=0.02, group=1, sampled_queries=1)
    query, key = widen(call, 200.0, 16, int(part * call.geometry.num_kv_blocks))
    assert_wide_selects(kernels, call, -query, key, 10**6)


@settings(max_examples=5)
@given(data=st.data(), decades=st.floats(0, 4), programs=st.sampled_from(PROGRAMS))
@pytest.mark.parametrize("rule", ["top_p", "top_p_or_threshold"])
def test_any_width_selects_as_the_reference(
    kernels: Kernels, rule: str, data: st.DataObject, decades: float, programs: int
) -> None:
    call = data.draw(kernel_calls(rule=rule))
    query, key = call.query_key()
    assert_wide_selects(kernels, call, query * 10**decades, key, programs)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_rows_that_are_not_finite_are_kept_whole_among_wide_ones(
    kernels: Kernels, spoilt: int, value: float, programs: int
) -> None:
    call = fixed_call(32, 200, c_k=1, threshold=0.1, sampled_queries=2, group=1)
    tokens = widen(call, 200.0)
    tokens[spoilt][0, 0, (20, 190)[spoilt], 3] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.score, "PROGRAMS_WANTED", programs)
        patch.setattr(kernels.score, "PROGRAMS_WANTED_OF_KEYS", programs)
        kept = run(kernels, call, *tokens).kept()
    assert kept.equal(call.keep(*tokens))
    # The second query block is not judged; the first is.
    visible = call.geometry.visible_blocks(CPU)
    assert kept[0, 0, 1].equal(visible[1])
    assert not kept[0, 0, 0].equal(visible[0])
