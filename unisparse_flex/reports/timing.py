"""Measured milliseconds of one attention call, dense and sparse, on its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from ..clock import in_turn, timed
from ..passes import SparseConfig
from ..passes.attend import run_compiled
from ..passes.calls import SdpaCall
from ..passes.decision import flex_lowers, refuse

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
    """Times a call both ways, also where speed or the settings keep it dense; compiles for it.

    Args:
        call: A call of real tensors.
        config: Its settings.
        repeats: Timed runs of each kind, after one that warms up.
    """
    device = call.query.device
    forced = replace(config, min_length=0, dense=False)
    runs: list[Callable[[], object]] = [call.run_dense]
    if refuse(call, forced) is None and flex_lowers(call):
        runs.append(lambda: run_compiled(call, forced))
    with torch.compiler.set_stance("default"):
        dense_ms, *sparse_ms = _milliseconds(runs, device, repeats)
    return CallTime(dense_ms=dense_ms, sparse_ms=sparse_ms[0] if sparse_ms else None)


def _milliseconds(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """The median of each run; they take turns, so that other load meets all of them."""
    for run in runs:
        run()
    turns = in_turn([partial(_seconds, run, device) for run in runs], repeats=repeats)
    return [median(seconds) * 1e3 for seconds in turns]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return timed(run, device)[1]
