"""Numbers of things are said as one says them."""

from __future__ import annotations

import pytest
import torch

from unisparse_flex.counted import counted
from unisparse_flex.doctor.backends import check_device
from unisparse_flex.evaluation import describe_device


@pytest.mark.parametrize(
    ("count", "verb", "said"),
    [
        (0, "", "0 layers"),
        (1, "", "1 layer"),
        (2, "", "2 layers"),
        (0, "stay", "0 layers stay"),
        (1, "stay", "1 layer stays"),
        (2, "stay", "2 layers stay"),
    ],
)
def test_one_is_singular(count: int, verb: str, said: str) -> None:
    assert counted(count, "layer", verb) == said


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_says_its_threads(monkeypatch: pytest.MonkeyPatch, threads: int, said: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cpu = torch.device("cpu")
    assert describe_device(cpu).endswith(f", {said}")
    assert f", {said}" in check_device(cpu).detail
