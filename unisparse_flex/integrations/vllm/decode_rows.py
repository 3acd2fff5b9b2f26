"""Rows of one token that decode, computed: a choice of units, then the parent's kernel over them.

Symbols: B rows, Hq/Hkv heads, G query heads of a key head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...block_masks.pages import DecodeSelector, PageSummaries, PageTables, choose_units
from .cache_view import CacheView
from .counters import counting
from .kernels import ParentKernel, Sequences

# Sequences up to which a choice brings summaries up to date on its way. That saves a kernel, and
# takes programs.
FEW_SEQUENCES = 32
# Parts into which the keys of a sequence are cut at most, where sequences are few.
MOST_SPLITS = 32


class Schedule:
    """What a parent's kernel computes of lengths, once a forward for the layers of a group.

    It says how work is divided, which is as right for the lengths of another layer.
    """

    def __init__(self) -> None:
        self._first: Any = None
        self._made: Tensor | None = None

    def read(self, layer: Any, make: Callable[[], Tensor | None]) -> Tensor | None:
        """The schedule, made anew for the layer that asked first: it begins a forward.

        So a graph that records a forward records it too, whoever ran these rows before.
        """
        if self._first is None or self._first is layer:
            self._first, self._made = layer, make()
        return self._made


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeRows:
    """Rows of a batch that decode.

    Attributes:
        lengths: int32 [B], keys of each; 0 for rows that only fill up a graph.
        tables: int32 [B, pages], their page tables.
        tokens: Which tokens of the batch these are: a range, or int64 [B].
        few: Keys of a row that is read whole: to choose would take longer.
        is_behind: Whether summaries do not know the rows' own keys yet, and a choice tells them.
        schedule: The kernel's, for the layers that compute these rows.
    """

    lengths: Tensor
    tables: Tensor
    tokens: slice | Tensor
    few: int = 0
    is_behind: bool = False
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeSpace:
    """Memory that the layers of a group share, one after the other; graphs write to it.

    Attributes:
        selector: Which units are kept.
        names: Room for the units of every row and key head of the largest batch.
        starts: int32 [B * Hkv + 1], 0 and up: every sequence is one row.
        query: [B, Hq, D], rows side by side, which in a batch lie among keys and values.
    """

    selector: DecodeSelector
    names: PageTables
    starts: Tensor
    query: Tensor

    @classmethod
    def create(
        cls, selector: DecodeSelector, query: Tensor, *, kv_heads: int, units: int
    ) -> DecodeSpace:
        """Room for the rows of ``query``, [B, Hq, D] and written to, and so many units of each."""
        rows, device = query.shape[0], query.device
        sequences = rows * kv_heads
        names = PageTables.create(sequences, units, counting.decode_units_on(device))
        # What a graph reads before anything was written must name a unit that is there.
        names.tables.zero_()
        names.lengths.zero_()
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        return cls(selector=selector, names=names, starts=starts, query=query)

    @staticmethod
    def bytes(
        selector: DecodeSelector,
        *,
        rows: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        length: int,
    ) -> int:
        """Of page tables, of what units weigh and of queries, for so many rows of so many keys."""
        units = -(-length // selector.unit)
        return 4 * rows * ((q_heads + kv_heads) * units + q_heads * head_dim)


def attend_decode(
    impl: Any,
    layer: Any,
    kernel: ParentKernel,
    view: CacheView,
    summaries: PageSummaries,
    space: DecodeSpace,
    rows: DecodeRows,
    query: Tensor,
    output: Tensor,
) -> None:
    """Attends to chosen units, every key head of every row a sequence of its own.

    Args:
        impl: vLLM's implementation of the layer.
        layer: The layer.
        kernel: What attends.
        view: The layer's cache in units, with the keys of this batch.
        summaries: Those of its pages, with units; but for ``rows.is_behind`` up to date.
        space: Memory for the choice.
        rows: The rows.
        query: [B, Hq, D] or as many numbers, of the rows alone.
        output: As many numbers; written.
    """
    heads, kv_heads, head_dim = impl.num_heads, impl.num_kv_heads, impl.head_size
    batch, page = rows.lengths.shape[0], view.pages.shape[2]
    width = rows.tables.shape[1] * (page // view.unit)
    query = query.view(batch, heads, head_dim)
    apart = None if query.is_contiguous() else space.query[:batch]
    choose(impl, view, summaries, space, rows, query, apart)
    packed = query if apart is None else apart
    sequences = batch * kv_heads
    given = Sequences(
        query=packed.view(sequences, heads // kv_heads, head_dim),
        output=output.view(sequences, heads // kv_heads, head_dim),
        starts=space.starts[: sequences + 1],
        rows=1,
        lengths=space.names.lengths[:sequences],
        keys=rows.tables.shape[1] * page,
        tables=space.names.tables[:sequences, :width],
        splits=splits_of(sequences, query.device),
    )
    schedule = rows.schedule.read(impl, lambda: kernel.schedule(impl, view, given))
    kernel.attend(impl, layer, view, replace(given, schedule=schedule))


def choose(
    impl: Any,
    view: CacheView,
    summaries: PageSummaries,
    space: DecodeSpace,
    rows: DecodeRows,
    query: Tensor,
    packed: Tensor | None = None,
) -> None:
    """Writes the units that rows read to ``space``; arguments as of `attend_decode`.

    ``packed``, as large as the query, is where the query is copied to.
    """
    assert summaries.units is not None
    choose_units(
        query,
        summaries.units,
        rows.tables,
        rows.lengths,
        space.names,
        selector=space.selector,
        scale=impl.scale,
        steps=view.steps,
        packed=packed,
        few=rows.few,
        written=summaries if rows.is_behind else None,
    )


def follows_keys(requests: int, kv_heads: int) -> bool:
    """Whether a choice for so many rows is faster when it brings summaries up to date besides."""
    return requests * kv_heads <= FEW_SEQUENCES


def splits_of(sequences: int, device: torch.device) -> int:
    """Into how many parts keys are cut so that there are as many as multiprocessors, or nearly."""
    if device.type != "cuda":
        return 1
    return max(1, min(MOST_SPLITS, _multiprocessors(device) // sequences))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
