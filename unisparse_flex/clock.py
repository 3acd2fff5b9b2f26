"""How long a function takes, for evaluation, reports and the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a function returns, and its seconds, the device's queue empty at both ends."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def in_turn(clocks: Sequence[Callable[[], float]], *, repeats: int) -> list[list[float]]:
    """What each clock says, one list for each, after taking turns ``repeats`` times.

    Turns spread whatever else the machine does evenly.

    Args:
        clocks: Each runs something once and returns how long it took.
        repeats: Turns.
    """
    turns = [[clock() for clock in clocks] for _ in range(repeats)]
    return [list(column) for column in zip(*turns, strict=True)]


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
