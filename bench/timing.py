"""The clock of the benchmarks: how long a function takes on a device, and the bytes at its peak.

Wall-clock time is `unisparse_flex.clock`'s; here are CPU time, CUDA events and CUDA graphs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from unisparse_flex.clock import in_turn, timed

__all__ = [
    "LONG_MS",
    "STATISTIC",
    "graph_ms",
    "host_seconds",
    "in_turn",
    "kernel_ms",
    "measure",
    "measure_in_graph",
    "peak_bytes",
    "plain_ms",
    "time_cuda",
    "timed",
]

# Most repeats of one number.
MOST = 60
# Seconds that the repeats of one number on the GPU may take; a slower call is repeated LEAST times.
BUDGET, LEAST = 0.25, 3
# Milliseconds above which the gaps between launches are nothing, and above which once is enough.
LONG_MS, VERY_LONG_MS = 100.0, 1000.0
# A graph holds so many calls that it takes about this long.
GRAPH_MS, MOST_CALLS = 2.0, 20
STATISTIC = (
    "median between CUDA events; graph: calls captured as one CUDA graph, plain: launched from "
    f"Python; the L2 cache is not flushed; a call over {LONG_MS:g} ms is timed plain alone, one "
    f"over {VERY_LONG_MS:g} ms once"
)


def measure(function: Callable[[], Any], device: str, *, least: int, budget: float) -> list[float]:
    """Seconds of each call, sorted, after warming up: ``least``, more while ``budget`` lasts.

    On CUDA between events, calls queued one after the other as a model queues its layers; on the
    CPU those that the process computed, whatever else runs there.
    """
    function()
    warm_up = _time_queued(function, 4) if device == "cuda" else [_time_cpu(function)]
    affordable = int(budget / max(min(warm_up), 1e-6))
    repeats = max(least, min(affordable, MOST))
    if device == "cuda":
        return sorted(_time_queued(function, repeats))
    return sorted(_time_cpu(function) for _ in range(repeats))


def _time_cpu(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _time_queued(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds from the end of one call to that of the next."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    function()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in itertools.pairwise(events)]


def time_cuda(function: Callable[[], Any]) -> float:
    """Seconds of one call between CUDA events, its launches included."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def plain_ms(function: Callable[[], Any]) -> float:
    """Median of a call as Python launches it."""
    function()
    return median(_repeat(function)) * 1e3


def graph_ms(function: Callable[[], Any]) -> float:
    """Median of a call inside a CUDA graph: what the GPU needs, without gaps between launches."""
    return median(measure_in_graph(function)) * 1e3


def measure_in_graph(function: Callable[[], Any]) -> list[float]:
    """Seconds of a call inside a CUDA graph, sorted."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    (once,) = _captured(function, 1, time_once=True)
    calls = max(1, min(MOST_CALLS, math.ceil(GRAPH_MS / max(once * 1e3, 1e-3))))
    return sorted(seconds / calls for seconds in _captured(function, calls))


def _captured(function: Callable[[], Any], calls: int, *, time_once: bool = False) -> list[float]:
    """Seconds of so many calls in one graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        if time_once:
            graph.replay()
            return [time_cuda(graph.replay)]
        return _repeat(graph.replay)
    finally:
        graph.reset()


def _repeat(function: Callable[[], Any]) -> list[float]:
    """Seconds of each of several calls."""
    first = time_cuda(function)
    more = max(LEAST, min(MOST, int(BUDGET / max(first, 1e-6)))) - 1
    if first * 1e3 > VERY_LONG_MS:
        more = 0
    return [first, *(time_cuda(function) for _ in range(more))]


def host_seconds(function: Callable[[], Any], calls: int = 200) -> float:
    """Least time that Python takes from one launch of a call to the next; short calls only."""

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = (time.perf_counter() - start) / calls
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return seconds

    for _ in range(3):
        function()
    return min(turn() for _ in range(4))


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
