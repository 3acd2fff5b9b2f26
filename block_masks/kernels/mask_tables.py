"""The tables of masks on a GPU: what was found out of one kind of mask is used for the next."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..geometry import BlockGeometry
from ..key_intervals import ROW_FIELDS
from ..masks import ends_plan
from .recording import Recordings

_recordings = Recordings()
SETTINGS = ("c_q", "c_k", "sampled_queries", "sink_blocks", "last_query_blocks")
# Which of the tables are empty where no composites, or no samples, are scored.
EMPTY = {1: "c_q", 2: "sampled_queries"}


def tables_of_mask(
    mask: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    geometry: BlockGeometry,
    batch: int,
    device: torch.device,
    **settings: int,
) -> list[Tensor]:
    """The tables of `key_intervals.interval_tables`, made by the kernels.

    Args:
        mask: A formula that `masks.has_intervals`.
        tensors: What it reads.
        numbers: The integers that it names.
        geometry: The block grid, without the mask.
        batch: Batch elements B.
        device: Where they live.
        settings: The other arguments of `interval_tables`.

    Returns:
        Them in the order of `IntervalTables.tensors`.
    """
    from .intervals import make_tables

    plan = ends_plan(mask, tuple(numbers), len(tensors), geometry.causal_offset)
    q_len, kv_len = geometry.q_len, geometry.kv_len
    ends = plan.ends(tensors, batch=batch, q_len=q_len, kv_len=kv_len, device=device)
    logs = share_logs(settings["c_k"], device)
    count = batch if plan.varies else 1

    def compute() -> list[Tensor]:
        made: Any = make_tables(ends, logs, geometry, batch=count, **settings)
        return [table for table in made.tensors() if table.numel()]

    kind = (ends.kind, geometry, count, *(settings[name] for name in SETTINGS))
    found = list(_recordings.run(kind, (logs, *ends.tensors()), compute))
    for at, name in EMPTY.items():
        if not settings[name]:
            found.insert(at, logs.new_empty((count, 0, ROW_FIELDS), dtype=torch.int32))
    return found


@lru_cache(maxsize=64)
def share_logs(c_k: int, device: torch.device) -> Tensor:
    """Log2 of the share of a group of keys that is valid, by how many are: float32 [c_k + 1].

    Made before a graph is captured: what is made meanwhile is the graph's own.
    """

    def make() -> Tensor:
        logs = (torch.arange(c_k + 1, device=device) / c_k).log2()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return logs

    # Modes of tracing, and pools of memory that a graph owns, are a thread's own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()
