"""Keys in the pages of a cache: their means, kept by page, and the pages of kept blocks.

Symbols: Hkv key heads, Hq query heads, P keys of a page, D head_dim, Nq/Nk query and key blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..block_lists import BlockLists
from ..geometry import BlockGeometry
from .gpu import early_options, starts_early
from .launch import Launch
from .recording import empty
from .scratch import power_of_two

# Tokens whose pages one program looks at, where there are more than a few.
TOKENS = 16
FEW = 256
# Keys that one program reads at a time there, and numbers of them that a warp holds.
FEW_ROWS, OF_WARP = 32, 4096


@triton.jit
def _summarize_unit(key, held, size, numbers, scales, line, head_dim, column):
    """Writes what decoding needs of a unit: the mean of its held keys, and their deviations.

    Each in 8 bits, with a factor of its own. Returns both, [WIDTH, 2] and [2].
    """
    mean = tl.sum(key, 0) / size
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    apart = tl.where(held, key - mean[None, :], 0.0)
    spread = tl.sqrt(tl.sum(apart * apart, 0) / size)
    # What is reduced together waits once.
    found = tl.join(mean, spread)
    is_known = tl.abs(found) < float("inf")
    factor = tl.max(tl.where(is_known, tl.abs(found), float("inf")), 0) / 127
    factor = tl.where(factor < float("inf"), factor, float("nan")).to(scales.dtype.element_ty)
    at = line * 2 + tl.arange(0, 2)
    tl.store(scales + at, factor)
    factor = factor.to(tl.float32)
    parts = tl.where(is_known, found, 0.0) / tl.where(factor > 0, factor, 1.0)[None, :]
    parts = tl.minimum(tl.maximum(tl.floor(parts + 0.5), -127.0), 127.0)
    out = numbers + at[None, :] * head_dim + column[:, None]
    tl.store(out, parts.to(tl.int8), mask=(column < head_dim)[:, None])
    return parts, factor


@triton.jit
def _average_page(
    base,
    means,
    page,
    head,
    stride_row,
    heads,
    head_dim,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes the means of every GROUP keys of a full page of one key head, ROWS at a time."""
    column = tl.arange(0, WIDTH)
    inside = (column < head_dim)[None, :]
    groups: tl.constexpr = PAGE // GROUP
    of: tl.constexpr = ROWS // GROUP if ROWS > GROUP else 1
    for first in range(0, PAGE, of * GROUP):
        total = tl.zeros([of, WIDTH], dtype=tl.float32)
        for start in range(first, first + of * GROUP, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            at = base + row * stride_row + column[None, :]
            key = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.reshape(key, [of, ROWS // of, WIDTH]), 1)
        mean = total / GROUP
        # As composite keys that are pooled in place.
        mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
        line = (page * heads + head) * groups + first // GROUP + tl.arange(0, of)
        out = means + line[:, None] * head_dim + column[None, :]
        tl.store(out, mean.to(means.dtype.element_ty), mask=inside)


@triton.jit
def _summarize_last(
    base,
    place,
    page,
    head,
    numbers,
    scales,
    pinned,
    stride_row,
    heads,
    head_dim,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Summarizes the unit whose last key so far is at ``place`` in a page; it is not pinned.

    Returns what `_summarize_unit` does.
    """
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, UNIT)
    held = (row <= place % UNIT)[:, None]
    at = base + (place - place % UNIT + row).to(tl.int64)[:, None] * stride_row
    inside = held & (column < head_dim)[None, :]
    key = tl.load(at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    size = (place % UNIT + 1).to(tl.float32)
    line = (page * heads + head) * (PAGE // UNIT) + place // UNIT
    tl.store(pinned + line, tl.zeros([], dtype=tl.uint8))
    return _summarize_unit(key, held, size, numbers, scales, line, head_dim, column)


@triton.jit(do_not_specialize=["count"])
def _summarize(
    keys,
    means,
    numbers,
    scales,
    pinned,
    slots,
    stride_page,
    stride_head,
    stride_row,
    count,
    heads,
    head_dim,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What the keys of the slots change, TOKENS of them a program.

    With EARLY it may start before what wrote the keys is done, and a choice of units before it is.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    for i in range(TOKENS):
        token = tl.program_id(0) * TOKENS + i
        slot = tl.load(slots + token, mask=token < count, other=-1)
        page = (slot // PAGE).to(tl.int64)
        base = keys + page * stride_page + head.to(tl.int64) * stride_head
        if (slot >= 0) & (slot % PAGE == PAGE - 1):
            _average_page(
                base, means, page, head, stride_row, heads, head_dim, PAGE, GROUP, ROWS, WIDTH
            )
        if UNIT:
            behind = tl.load(slots + token + 1, mask=token + 1 < count, other=-1)
            # The last of its unit that was written.
            if (slot >= 0) & ((slot % UNIT == UNIT - 1) | (behind != slot + 1)):
                _summarize_last(
                    base, slot % PAGE, page, head, numbers, scales, pinned, stride_row, heads,
                    head_dim, PAGE, UNIT, WIDTH,
                )  # fmt: skip


@triton.jit(do_not_specialize=["length", "composites"], do_not_specialize_on_alignment=["table"])
def _pool_pages(
    keys,
    table,
    means,
    out,
    stride_page,
    stride_head,
    stride_row,
    length,
    composites,
    heads,
    head_dim,
    PAGE: tl.constexpr,
    OF_MEAN: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Composite keys of GROUP keys: from means of OF_MEAN keys, or from the keys at the end."""
    composite = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = column < head_dim
    first = composite * GROUP
    total = tl.zeros([WIDTH], dtype=tl.float32)
    per_page: tl.constexpr = PAGE // OF_MEAN
    if (first + GROUP - 1) // PAGE * PAGE + PAGE <= length:
        # Every page that it touches is finished.
        for i in tl.static_range(GROUP // OF_MEAN):
            key = first + i * OF_MEAN
            page = tl.load(table + key // PAGE).to(tl.int64)
            line = (page * heads + head) * per_page + key % PAGE // OF_MEAN
            at = means + line * head_dim + column
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total = total / (GROUP // OF_MEAN)
    elif first < length:
        for i in range(tl.minimum(GROUP, length - first)):
            key = first + i
            page = tl.load(table + key // PAGE).to(tl.int64)
            at = keys + page * stride_page + head.to(tl.int64) * stride_head
            at += (key % PAGE).to(tl.int64) * stride_row
            total += tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
        total = total / tl.minimum(GROUP, length - first)
        total = tl.where(tl.abs(total) < float("inf"), total, float("nan"))
    at = out + (head.to(tl.int64) * composites + composite) * head_dim + column
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "q_len", "offset", "width", "first"],
    do_not_specialize_on_alignment=["table"],
)
def _name_pages(
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
    table,
    tables,
    lengths,
    counter,
    q_blocks,
    kv_blocks,
    q_len,
    offset,
    width,
    first,
    group,
    page_step,
    head_step,
    BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Writes what `pages.PageTables` holds, for one block of query rows and one head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    line = block if SHARED else head * q_blocks + block
    partial = tl.load(partial_counts + line)
    full = tl.load(full_counts + line)
    at = line.to(tl.int64) * kv_blocks
    sequence = first + head * q_blocks + block
    out = tables + sequence.to(tl.int64) * width
    unit = head // group * head_step
    pages = (partial + full) * PAGES
    for start in range(0, pages, CHUNK):
        place = start + tl.arange(0, CHUNK)
        kept = place // PAGES
        is_full = kept < full
        exists = place < pages
        number = tl.load(full_indices + at + kept, mask=exists & is_full, other=0)
        behind = partial_indices + at + kept - full
        number += tl.load(behind, mask=exists & (is_full == 0), other=0)
        # Pages of the last block that hold no key have no entry.
        page = number * PAGES + place % PAGES
        held = exists & (page * (BLOCK // PAGES) <= (offset + q_len - 1))
        physical = tl.load(table + page, mask=held, other=0)
        tl.store(out + place, physical * page_step + unit, mask=exists)
    last = tl.minimum(block * BLOCK + BLOCK, q_len) - 1 + offset
    tl.store(lengths + sequence, (partial + full) * BLOCK - (BLOCK - 1 - last % BLOCK))
    tl.atomic_add(counter, (partial + full).to(tl.int64))


_launch_summarize = Launch(_summarize)
_launch_pool = Launch(_pool_pages)
_launch_names = Launch(_name_pages)


def summarize(
    pages: Tensor, means: Tensor, units: tuple[Tensor, Tensor, Tensor] | None, slots: Tensor
) -> None:
    """Brings summaries up to date; `pages.PageSummaries.update` on the GPU.

    Args:
        pages: [all pages, Hkv, P, D], numbers of a key side by side; P is a power of two.
        means: [all pages, Hkv, R, D], contiguous.
        units: Numbers, scales and pinned ones of `pages.UnitSummaries`, contiguous; ``None`` for
            none.
        slots: int64 [tokens]: page * P + place of keys that were written; below 0 for none.
    """
    count, heads, page = slots.shape[0], pages.shape[1], pages.shape[2]
    numbers, scales, pinned = (means, means, means) if units is None else units
    unit, width = 0 if units is None else page // numbers.shape[2], power_of_two(pages.shape[3])
    early = unit > 0 and starts_early(pages.device)
    # Tokens that decode have pages of their own, those of a prompt share them. Each is little work,
    # and a single warp does not wait for others.
    tokens, rows, warps = TOKENS, page, 4
    if count <= FEW:
        tokens, rows = 1, min(page, FEW_ROWS)
        warps = min(4, max(1, max(unit, rows) * width // OF_WARP))
    _launch_summarize(
        (-(-count // tokens), heads, 1),
        pages,
        means,
        numbers,
        scales,
        pinned,
        slots,
        *pages.stride()[:3],
        count,
        heads,
        pages.shape[3],
        TOKENS=tokens,
        PAGE=page,
        GROUP=page // means.shape[2],
        UNIT=unit,
        ROWS=rows,
        WIDTH=width,
        EARLY=early,
        num_warps=warps,
        enable_fp_fusion=True,
        **early_options(early),
    )


def pool_pages(
    pages: Tensor, table: Tensor, means: Tensor, *, length: int, group: int, groups: int
) -> Tensor:
    """Composite keys of one sequence: [1, Hkv, groups, D], 0 after the last key.

    Args:
        pages: As `summarize` takes them.
        table: int32 [n], the sequence's pages in order.
        means: As `summarize` takes them, those of finished pages up to date.
        length: Keys of the sequence.
        group: Keys per composite key, a multiple of those of a mean.
        groups: Composite keys in the result.
    """
    heads, page, head_dim = pages.shape[1:]
    out = empty(pages, (1, heads, groups, head_dim))
    _launch_pool(
        (groups, heads, 1),
        pages,
        table,
        means,
        out,
        *pages.stride()[:3],
        length,
        groups,
        heads,
        head_dim,
        PAGE=page,
        OF_MEAN=page // means.shape[2],
        GROUP=group,
        WIDTH=power_of_two(head_dim),
        num_warps=2,
        enable_fp_fusion=True,
    )
    return out


def name_pages(
    lists: BlockLists,
    table: Tensor,
    tables: Tensor,
    lengths: Tensor,
    counter: Tensor,
    *,
    geometry: BlockGeometry,
    page: int,
    group: int,
    heads: int,
    steps: tuple[int, int],
    first: int,
) -> None:
    """Fills `pages.PageTables` from ``first`` on; `pages.name_pages` on the GPU.

    Args:
        lists: The kept blocks, [1, Hq or 1, Nq, Nk].
        table: int32 [n], the sequence's pages in order.
        tables: int32 [sequences, width].
        lengths: int32 [sequences].
        counter: int64 [1], to which the kept blocks are added.
        geometry: The block grid.
        page: P; divides the block size.
        group: Query heads to a key head.
        heads: Hq.
        steps: What a page, and a key head, adds to the number of a page.
        first: The first sequence that is written.
    """
    _launch_names(
        (geometry.num_q_blocks, heads, 1),
        *lists.tensors(),
        table,
        tables,
        lengths,
        counter,
        geometry.num_q_blocks,
        geometry.num_kv_blocks,
        geometry.q_len,
        geometry.causal_offset or 0,
        tables.stride(0),
        first,
        group,
        *steps,
        BLOCK=geometry.block_size,
        PAGES=geometry.block_size // page,
        CHUNK=256,
        SHARED=lists.kv_num_blocks.shape[1] == 1,
        num_warps=2,
        enable_fp_fusion=True,
    )
