"""Composite and sampled rows scored in one launch are scored as by two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .calls import assert_same_lists, fixed_call, run
from .interpreter import Kernels
from .test_intervals import MaskedCall


def counted(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """The function, with what it returns noted."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        results.append(function(*arguments, **keywords))
        return results[-1]

    return call


@pytest.mark.parametrize("programs", [1, 10**6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_one_launch_scores_as_two_do(
    kernels: Kernels, causal: bool, masked: bool, programs: int
) -> None:
    call = fixed_call(
        100, 150, causal=causal, top_k=3, sampled_queries=4, kv_heads=2, dtype=torch.float16
    )
    query, key = call.query_key()
    intervals = None
    if masked:
        valid = (torch.arange(150) >= 21)[None]
        intervals = MaskedCall(call=call, text="t0[b, kv]", tensors=(valid,)).tables()

    def apart(coarse: Any, fine: Any, **turn: Any) -> tuple[Any, Any]:
        return kernels.score.score(coarse, **turn), kernels.score.score(fine, **turn)

    both: list[Any] = []
    two: list[Any] = []
    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PROGRAMS_WANTED", "PROGRAMS_WANTED_OF_KEYS"):
            patch.setattr(kernels.score, name, programs)
        patch.setattr(kernels.score, "_launch_both", counted(kernels.score._launch_both, launches))
        patch.setattr(kernels.lists, "score_both", counted(kernels.lists.score_both, both))
        lists = run(kernels, call, query, key, intervals=intervals)
        assert len(launches) == 1
        patch.setattr(kernels.lists, "score_both", counted(apart, two))
        assert_same_lists(run(kernels, call, query, key, intervals=intervals), lists)
        assert len(launches) == 1
    for one, other in zip(both[0], two[0], strict=True):
        assert one.totals[:, 0].equal(other.totals[:, 0])


@pytest.mark.parametrize(
    ("few", "dtype"), [(8192, torch.float32), (0, torch.float16)], ids=["float32", "many rows"]
)
def test_scores_are_launched_alone_where_registers_do_not_suffice(
    kernels: Kernels, few: int, dtype: torch.dtype
) -> None:
    call = fixed_call(40, top_k=2, sampled_queries=4, dtype=dtype)
    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.score, "FEW_ROWS", few)
        patch.setattr(kernels.score, "_launch_both", counted(kernels.score._launch_both, launches))
        run(kernels, call, *call.query_key())
    assert not launches
