"""Kept blocks as the page tables of short sequences, which any kernel for paged keys can read.

A block of query rows of one head is a sequence of its own: its keys are the kept blocks, one
after the other, up to the last row's position. Rows and keys end together and only the blocks of
the rows' own positions stand last, so plain causal attention, aligned at the end, is exact.

Symbols: Hq/Hkv heads, Nq/Nk query and key blocks, P keys of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..block_lists import BlockLists
from ..geometry import BlockGeometry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PageTables:
    """The keys of many sequences, each a block of query rows of one head.

    Sequences stand by head, then by block of rows.

    Attributes:
        tables: int32 [sequences, width], numbers of pages; what lies after ``lengths`` says
            nothing.
        lengths: int32 [sequences], keys of each.
        counter: int64 [1], to which kept blocks are added.
    """

    tables: Tensor
    lengths: Tensor
    counter: Tensor

    @classmethod
    def create(cls, sequences: int, width: int, counter: Tensor) -> PageTables:
        """Room for so many sequences of at most ``width`` pages, on the counter's device."""
        return cls(
            tables=counter.new_empty((sequences, width), dtype=torch.int32),
            lengths=counter.new_empty((sequences,), dtype=torch.int32),
            counter=counter,
        )


def name_pages(
    lists: BlockLists,
    table: Tensor,
    out: PageTables,
    *,
    geometry: BlockGeometry,
    page: int,
    q_heads: int,
    kv_heads: int,
    steps: tuple[int, int],
    first: int = 0,
) -> None:
    """Writes the pages of kept blocks, Hq * Nq sequences from ``first`` on.

    Args:
        lists: The kept blocks, [1, Hq or 1, Nq, Nk]; those of the rows' own positions among them.
        table: int32 [n], the pages of the keys in order.
        out: Where they are written; at least Nk * block_size / P wide.
        geometry: The block grid; causal, aligned with the last key.
        page: P; divides the block size.
        q_heads: Hq.
        kv_heads: Hkv.
        steps: What a page, and a key head, adds to the number of a page.
        first: The first sequence that is written.
    """
    if out.tables.device.type == "cuda":
        kernels.name_pages(
            lists,
            table,
            out.tables,
            out.lengths,
            out.counter,
            geometry=geometry,
            page=page,
            group=q_heads // kv_heads,
            heads=q_heads,
            steps=steps,
            first=first,
        )
        return
    size, device = geometry.block_size, table.device
    kept = lists.kept().expand(1, q_heads, -1, -1)[0]
    counts = kept.sum(-1)
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    per_block = size // page
    pages = (order[..., None] * per_block + torch.arange(per_block, device=device)).flatten(2)
    numbers = table[pages.clamp(max=-(-geometry.kv_len // page) - 1)] * steps[0]
    numbers += (torch.arange(q_heads, device=device) // (q_heads // kv_heads) * steps[1])[
        :, None, None
    ]
    q_blocks = geometry.num_q_blocks
    last = geometry.last_positions(size, q_blocks, device)
    place = slice(first, first + q_heads * q_blocks)
    out.tables[place, : numbers.shape[2]] = numbers.flatten(0, 1).to(torch.int32)
    out.lengths[place] = (counts * size - (size - 1 - last % size)).flatten().to(torch.int32)
    out.counter.add_(counts.sum())
