"""Compiles what sparse rows of any length need, before the first of them comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .counters import counting
from .decode_rows import DecodeRows, attend_decode
from .layer_state import LayerState
from .planning import Row
from .sparse_rows import SparseRows, attend_sparse

# Key blocks of the shortest rows: lengths below share their kernels.
BLOCKS = 256


def row_lengths(budget: int, longest: int, size: int) -> list[tuple[int, int]]:
    """Queries and keys of rows that between them need every kernel.

    Args:
        budget: Most tokens of a batch.
        longest: Most tokens of a request.
        size: Tokens of a block.
    """
    ends = [min(longest, BLOCKS * size)]
    while ends[-1] < longest:
        ends.append(min(longest, 2 * ends[-1]))
    return sorted({(min(rows, end), end) for end in ends for rows in (budget, size)})


def warm_up(layers: Iterable[tuple[Any, LayerState]], budget: int, longest: int) -> None:
    """Runs sparse rows that nobody reads over the caches of layers, one of each selector.

    Args:
        layers: vLLM's layers with their states, bound, on a GPU.
        budget: Most tokens of a batch.
        longest: Most tokens of a request.
    """
    seen = set()
    for layer, state in layers:
        key = state.selector, layer.impl.num_heads, layer.impl.num_kv_heads
        if state.selector is None or state.view is None or state.summaries is None or key in seen:
            continue
        seen.add(key)
        impl, pages = layer.impl, state.view.pages
        # A graph may be captured with this kernel in it: compiled now, on no page.
        state.written(torch.full((1,), -1, dtype=torch.int64, device=pages.device))
        kept = counting.kept_on(pages.device)
        before = kept.clone(), counting.visible_blocks, counting.sparse_calls
        for queries, length in row_lengths(budget, longest, state.selector.block_size):
            shape = queries, impl.num_heads, impl.head_size
            query = torch.zeros(shape, dtype=pages.dtype, device=pages.device)
            row = Row(index=0, start=0, stop=queries, length=length)
            # Page 0 of every cache is one that no request has.
            count = -(-length // pages.shape[2])
            tables = torch.zeros((1, count), dtype=torch.int32, device=pages.device)
            attend_sparse(
                impl,
                layer,
                state.kernel,
                state.view,
                state.summaries.means,
                state.selector,
                SparseRows([row], pages.device),
                tables,
                query,
                torch.empty_like(query),
            )
        if state.space is not None:
            _decode(layer, state, longest)
        kept.copy_(before[0])
        counting.visible_blocks, counting.sparse_calls = before[1:]


def _decode(layer: Any, state: LayerState, longest: int) -> None:
    """A row that decodes over no keys."""
    assert state.units is not None
    assert state.space is not None
    assert state.summaries is not None
    impl, pages = layer.impl, state.units.pages
    query = pages.new_zeros((1, impl.num_heads, impl.head_size))
    width = -(-longest // pages.shape[2])
    numbers = counting.decode_units_on(pages.device)
    before = numbers.clone()
    for is_behind in (False, True):
        attend_decode(
            impl,
            layer,
            state.kernel,
            state.units,
            state.summaries,
            state.space,
            DecodeRows(
                lengths=torch.zeros(1, dtype=torch.int32, device=pages.device),
                tables=torch.zeros((1, width), dtype=torch.int32, device=pages.device),
                tokens=slice(0, 1),
                is_behind=is_behind,
            ),
            query,
            torch.empty_like(query),
        )
    numbers.copy_(before)
