"""How long a function takes, for evaluation, reports and the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
# Share of the time that a computing thread has a core on a machine that does nothing else: 0.99 and
# more, where it was tried; beside a process for every second core 0.65.
LEAST_SHARE = 0.9
# Clocks of threads tick 64 times a second on some systems.
LEAST_SECONDS = 0.5


@dataclass(slots=True)
class CpuWatch:
    """How much of the time that is measured the measuring thread has a core.

    It computes, or waits for threads that do: what it lacks went to other work. That holds inside
    a container too, whose load average is that of the whole machine.

    Attributes:
        wall_seconds: That were measured.
        own_seconds: Of these, those in which the thread ran.
    """

    wall_seconds: float = 0.0
    own_seconds: float = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Adds what is done inside, by the thread that enters."""
        wall, own = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.wall_seconds += time.perf_counter() - wall
            self.own_seconds += time.thread_time() - own

    def say_busy(self, device: torch.device) -> str | None:
        """A sentence where other work visibly took part of the machine; ``None`` elsewhere.

        Args:
            device: What computed; of a GPU nothing is known by its host.
        """
        if device.type != "cpu" or self.wall_seconds < LEAST_SECONDS:
            return None
        share = self.own_seconds / self.wall_seconds
        if share >= LEAST_SHARE:
            return None
        return (
            "Other work took part of this machine while it was timed: the model had a core "
            f"{share:.0%} of the time, and times scatter; run again when it is idle."
        )


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
