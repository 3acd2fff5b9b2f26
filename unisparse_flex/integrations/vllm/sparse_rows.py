"""The sparse rows of a batch, computed: selection by row, attention of all of them at once.

Symbols: Hq/Hkv heads, n query rows of a request, Nq query blocks, D head_dim, P keys of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...block_masks import BlockGeometry, Selector
from ...block_masks.pages import PagedKeys, PageTables, name_pages, select_from_pages
from .cache_view import CacheView
from .counters import counting
from .kernels import ParentKernel, Sequences
from .planning import Row


@dataclass(slots=True, eq=False)
class SparseRows:
    """The sparse rows of a batch, and what layers that share it make of it once.

    Attributes:
        rows: The rows.
        device: Where the batch is.
        starts: By query heads and block size, the first row of every sequence.
    """

    rows: Sequence[Row]
    device: torch.device
    starts: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> int:
        """Query rows of all of them."""
        return sum(row.queries for row in self.rows)

    def starts_of(self, heads: int, size: int) -> Tensor:
        """int32 [N + 1]: where the sequences begin, by request, head and block of rows."""
        key = heads, size
        if key not in self.starts:
            parts, first = [], 0
            for row in self.rows:
                blocks = torch.arange(0, row.queries, size)
                head = torch.arange(heads)[:, None] * row.queries
                parts.append((first + head + blocks).flatten())
                first += heads * row.queries
            parts.append(torch.tensor([first]))
            self.starts[key] = to_device(torch.cat(parts).to(torch.int32), self.device)
        return self.starts[key]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def geometry_of(row: Row, selector: Selector) -> BlockGeometry:
    """The block grid of a row; where its prompt goes on, rows that follow are counted with it."""
    return BlockGeometry(
        q_len=row.queries,
        kv_len=row.length,
        block_size=selector.block_size,
        causal_offset=row.length - row.queries,
        rows_after=row.length * row.is_cut,
    )


def attend_sparse(
    impl: Any,
    layer: Any,
    kernel: ParentKernel,
    view: CacheView,
    means: Tensor,
    selector: Selector,
    split: SparseRows,
    tables: Tensor,
    query: Tensor,
    output: Tensor,
) -> None:
    """Attends to selected blocks for the sparse rows of a batch, in one launch.

    Args:
        impl: vLLM's implementation of the layer.
        layer: The layer.
        kernel: What attends.
        view: The layer's cache, with the keys of this batch.
        means: Those of its pages.
        selector: Which blocks are kept.
        split: The rows.
        tables: int32 [requests, pages], the batch's page tables.
        query: [tokens, Hq, D], of the whole batch.
        output: Of the whole batch, as many numbers; the rows of sparse requests are written.
    """
    heads, head_dim = impl.num_heads, impl.head_size
    query, result = query.view(-1, heads, head_dim), output.view(-1, heads, head_dim)
    size, page = selector.block_size, view.pages.shape[2]
    starts = split.starts_of(heads, size)
    packed = query.new_empty((heads * split.queries, 1, head_dim))
    attended = torch.empty_like(packed)
    longest = max(row.length for row in split.rows)
    width = -(-longest // size) * (size // page)
    names = PageTables.create(starts.shape[0] - 1, width, counting.kept_on(query.device))
    token = sequence = 0
    for row in split.rows:
        geometry = geometry_of(row, selector)
        place = slice(token, token + heads * row.queries)
        own = packed[place].view(heads, row.queries, head_dim)
        own.copy_(query[row.start : row.stop].transpose(0, 1))
        table = tables[row.index, : -(-row.length // page)]
        lists = select_from_pages(
            selector,
            own[None],
            PagedKeys(pages=view.pages, table=table, length=row.length, means=means),
            geometry=geometry,
            scale=impl.scale,
        )
        name_pages(
            lists,
            table,
            names,
            geometry=geometry,
            page=page,
            q_heads=heads,
            kv_heads=impl.num_kv_heads,
            steps=view.steps[:2],
            first=sequence,
        )
        token, sequence = place.stop, sequence + heads * geometry.num_q_blocks
        counting.visible_blocks += heads * visible_blocks(geometry)
    kernel.attend(
        impl,
        layer,
        view,
        Sequences(
            query=packed,
            output=attended,
            starts=starts,
            rows=size,
            lengths=names.lengths,
            keys=longest,
            tables=names.tables,
        ),
    )
    token = 0
    for row in split.rows:
        part = attended[token : token + heads * row.queries].view(heads, row.queries, head_dim)
        result[row.start : row.stop] = part.transpose(0, 1)
        token += heads * row.queries
    counting.sparse_calls += 1


def visible_blocks(geometry: BlockGeometry) -> int:
    """Blocks of one head that some row of their block of rows sees."""
    size, offset = geometry.block_size, geometry.causal_offset or 0
    ends = range(size, geometry.q_len + size, size)
    return sum((min(end, geometry.q_len) - 1 + offset) // size + 1 for end in ends)


def workspace_bytes(
    tokens: int, length: int, heads: int, head_dim: int, itemsize: int, size: int
) -> int:
    """Memory of a batch of one sparse row of so many tokens and keys, beside what the model has."""
    q_blocks, kv_blocks = -(-tokens // size), -(-length // size)
    # Rows before and after, by head; two block lists and a page table; scores in turns.
    rows = 2 * tokens * heads * head_dim * itemsize
    lists = 3 * heads * q_blocks * kv_blocks * 4
    return rows + lists + 128 * 2**20
