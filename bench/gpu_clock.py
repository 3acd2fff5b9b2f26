"""Milliseconds on the GPU, with and without the launches, and bytes at the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .timing import time_cuda

# Seconds that the repeats of one number may take; a slower call is repeated LEAST times.
BUDGET, LEAST, MOST = 0.25, 3, 60
# Milliseconds above which the gaps between launches are nothing, and above which once is enough.
LONG_MS, VERY_LONG_MS = 100.0, 1000.0
# A graph holds so many calls that it takes about this long.
GRAPH_MS, MOST_CALLS = 2.0, 20
STATISTIC = (
    "median between CUDA events; graph: calls captured as one CUDA graph, plain: launched from "
    f"Python; the L2 cache is not flushed; a call over {LONG_MS:g} ms is timed plain alone, one "
    f"over {VERY_LONG_MS:g} ms once"
)


def plain_ms(function: Callable[[], Any]) -> float:
    """Median of a call as Python launches it."""
    function()
    return _repeat(function)


def graph_ms(function: Callable[[], Any]) -> float:
    """Median of a call inside a CUDA graph: what the GPU needs, without gaps between launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    once = _captured_ms(function, 1, time_once=True)
    calls = max(1, min(MOST_CALLS, math.ceil(GRAPH_MS / max(once, 1e-3))))
    return _captured_ms(function, calls)


def _captured_ms(function: Callable[[], Any], calls: int, *, time_once: bool = False) -> float:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        if time_once:
            graph.replay()
            return time_cuda(graph.replay) * 1e3
        return _repeat(graph.replay) / calls
    finally:
        graph.reset()


def _repeat(function: Callable[[], Any]) -> float:
    first = time_cuda(function)
    more = max(LEAST, min(MOST, int(BUDGET / max(first, 1e-6)))) - 1
    if first * 1e3 > VERY_LONG_MS:
        more = 0
    return median([first, *(time_cuda(function) for _ in range(more))]) * 1e3


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that a call takes at its peak, beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_ms(function: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Device time of every kernel of a call, by name, from the profiler."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in profile.key_averages()}
    return {name: time / calls / 1e3 for name, time in times.items() if time > 0}
