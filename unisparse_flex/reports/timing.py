"""Measured milliseconds of one attention call, dense and sparse, on its own tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..passes import SdpaCall, SparseConfig, flex_lowers, refuse, run_compiled

REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTime:
    """What was measured of one call.

    Attributes:
        dense_ms: Milliseconds of SDPA, median of the repeats.
        sparse_ms: Milliseconds of the compiled sparse call, selection included; ``None`` where no
            block-sparse kernel takes the call.
    """

    dense_ms: float
    sparse_ms: float | None


@torch.no_grad()
def time_call(call: SdpaCall, config: SparseConfig, *, repeats: int = REPEATS) -> CallTime:
    """Times a call both ways, also where it stays dense for its speed; compiles where needed.

    Args:
        call: A call of real tensors.
        config: Its settings.
        repeats: Timed runs of each kind, after one that warms up.
    """
    device = call.query.device
    dense_ms = _milliseconds(call.run_dense, device, repeats)
    forced = replace(config, min_length=0)
    if refuse(call, forced) is not None or not flex_lowers(call):
        return CallTime(dense_ms=dense_ms, sparse_ms=None)
    with torch.compiler.set_stance("default"):
        sparse_ms = _milliseconds(lambda: run_compiled(call, forced), device, repeats)
    return CallTime(dense_ms=dense_ms, sparse_ms=sparse_ms)


def _milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
