"""The ends of prompts, of which decoding keeps what they looked at.

Symbols: Hq/Hkv heads, n pages of a request, P keys of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...block_masks.pages import (
    MOST_LOGITS,
    PROMPT_ROWS,
    DecodeSelector,
    UnitSummaries,
    pin_prompt,
)
from .cache_view import CacheView
from .planning import Row


def pin_prompts(
    impl: Any,
    view: CacheView,
    units: UnitSummaries,
    selector: DecodeSelector,
    rows: Sequence[Row],
    tables: Tensor,
    query: Tensor,
) -> None:
    """Pins the units of prompts that stay while they are answered.

    Args:
        impl: vLLM's implementation of the layer.
        view: The layer's cache, with the keys of this batch.
        units: Summaries of its units.
        selector: Says how many.
        rows: The prompts that end in this batch.
        tables: int32 [requests, pages], the batch's page tables.
        query: [tokens, Hq, D] or as many numbers, of the whole batch.
    """
    query = query.view(-1, impl.num_heads, impl.head_size)
    page = view.pages.shape[2]
    by_head = view.pages.transpose(0, 1)
    for row in rows:
        at = tables[row.index, : -(-row.length // page)].long()
        kept = pin_prompt(
            query[max(row.start, row.stop - PROMPT_ROWS) : row.stop],
            by_head[:, at].flatten(1, 2),
            length=row.length,
            selector=selector,
            scale=impl.scale,
        )
        units.pin(at, kept)


def prompt_bytes(length: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Memory of one prompt of so many keys at a time: these, and logits with their shares."""
    return length * kv_heads * head_dim * itemsize + 4 * 4 * MOST_LOGITS
