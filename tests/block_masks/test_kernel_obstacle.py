"""Why the GPU kernels do not select is said in words, whatever keeps them from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.kernels import operator
from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.selectors import DEFAULT_SELECTOR, FlexPrefill

LENGTH = 512
WHOLE = BlockGeometry(q_len=LENGTH, kv_len=LENGTH, block_size=128, causal_offset=0)


def mask(text: str) -> MaskProgram:
    tensors = (torch.zeros(1, LENGTH, dtype=torch.int64),)
    return MaskProgram.parse(text, tensors=tensors, batch=1, q_len=LENGTH, kv_len=LENGTH)


def obstacle(selector: Any = DEFAULT_SELECTOR, **changed: Any) -> str | None:
    tokens = torch.empty(1, 2, LENGTH, 64, dtype=torch.bfloat16)
    given: dict[str, Any] = {"query": tokens, "key": tokens, "geometry": WHOLE, "scale": 0.125}
    return selector.kernel_obstacle(**{**given, "attn_mask": None, **changed})


def test_on_a_cpu_there_are_none() -> None:
    assert obstacle() == "they need a CUDA device"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"geometry": replace(WHOLE, mask=mask("t0[b, q] == t0[b, kv]"))}, None),
        ({"geometry": replace(WHOLE, causal_offset=None, rows_after=128)}, "all rows of a call"),
        ({"geometry": replace(WHOLE, mask=mask("(q - kv) // 2 == 0"))}, "one run of keys"),
        ({"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool)}, "a tensor of pairs"),
        ({"key": torch.empty(1, 2, LENGTH, 64)}, "queries and keys of one dtype"),
        ({"scale": 0.0}, "a scale above 0"),
        ({"geometry": replace(WHOLE, q_len=1, kv_len=2**23)}, "at most 32767 blocks of keys"),
        ({"selector": FlexPrefill()}, "FlexPrefill has none"),
        ({"selector": UniSparse(head_thresholds=(0.1, 0.2))}, None),
    ],
)
def test_what_kernels_do_not_take_is_named(
    changed: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "keys_obstacle", lambda _: None)
    found = obstacle(**changed)
    assert found is None if expected is None else expected in str(found)


@pytest.mark.parametrize(
    ("capability", "failure", "expected"),
    [
        ((7, 5), "", "they need compute capability 8.0, got 7.5"),
        ((8, 6), "", None),
        ((8, 6), "3 of 9 blocks differ", "they fail on this GPU: 3 of 9 blocks differ"),
        ((9, 0), "what nobody asks", None),
    ],
)
def test_a_gpu_that_they_do_not_run_on_is_named(
    capability: tuple[int, int], failure: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(operator, "failure_of", lambda *_: failure)
    operator._build_obstacle.cache_clear()
    try:
        assert operator._build_obstacle(0) == expected
    finally:
        operator._build_obstacle.cache_clear()
