"""What kernels read of a mask of intervals, see `key_intervals`: a few launches for all tables.

Symbols: Bm batch elements (1 where all are alike), S tokens, Nq/Nk query and key blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import BlockGeometry
from ..key_intervals import BLOCK_FIELDS, ROW_FIELDS, IntervalTables
from ..masks import RowEnds
from .launch import Launch
from .nearest_keys import _following, _join_following, _join_preceding, _preceding, _write_nearest
from .recording import empty
from .scratch import power_of_two

# Of a key block: its first and last valid key, and what is true of it.
KEY_FIELDS = 3
# Blocks that are looked at in one step of what goes through all of them.
STEP_BLOCKS = 1024


@triton.jit(do_not_specialize=["stride_b", "stride_s", "kv_len", "blocks", "sinks"])
def _key_blocks(
    valid,
    logs,
    key_valid,
    weights,
    flags,
    found,
    nearest,
    stride_b,
    stride_s,
    kv_len,
    blocks,
    sinks,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HOLES: tl.constexpr,
):
    """One key block: which keys are valid, how many of each group, and the nearest ones."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = block * BLOCK + tl.arange(0, BLOCK)
    exists = key < kv_len
    here = exists
    if HOLES:
        at = valid + batch * stride_b + key.to(tl.int64) * stride_s
        here = tl.load(at, mask=exists, other=0) > 0
    tl.store(key_valid + batch * kv_len + key, here.to(tl.uint8), mask=exists)
    groups: tl.constexpr = BLOCK // GROUP
    count = tl.sum(tl.reshape(here.to(tl.int32), [groups, GROUP]), 1)
    place = (batch * blocks + block) * groups + tl.arange(0, groups)
    tl.store(weights + place, tl.load(logs + count))
    total = tl.sum(here.to(tl.int32), 0)
    some = (total > 0).to(tl.int32)
    true = some + (total == BLOCK).to(tl.int32) * 2
    if HOLES:
        near = nearest + (batch * blocks * BLOCK + key) * 2
        line = found + (batch * blocks + block) * 3
        _write_nearest(here, key, near, line, kv_len)
        tl.store(line + 2, true)
    else:
        sink = (block < sinks).to(tl.int32)
        tl.store(flags + batch * blocks + block, true + sink * 4)


@triton.jit(do_not_specialize=["kv_len", "blocks", "sinks"])
def _nearest_blocks(found, flags, kv_len, blocks, sinks, STEP: tl.constexpr):
    """Over all key blocks: the first valid key from each on, the last one up to it, and sinks."""
    batch = tl.program_id(0).to(tl.int64)
    line = found + batch * blocks * 3
    last = -1
    seen = 0
    for start in range(0, blocks, STEP):
        block = start + tl.arange(0, STEP)
        exists = block < blocks
        true = tl.load(line + block * 3 + 2, mask=exists, other=0)
        some = true % 2
        order = tl.cumsum(some, 0) + seen
        sink = some * (order <= sinks).to(tl.int32)
        tl.store(flags + batch * blocks + block, true + sink * 4, mask=exists)
        last = _join_preceding(line, block, exists, last)
        seen += tl.sum(some, 0)
    _join_following(line, kv_len, blocks, STEP)


@triton.jit
def _places_of(value, ids, kv_len, STEPS: tl.constexpr):
    """Where a value begins, and ends, among ids in order."""
    begin = tl.zeros_like(value)
    end = begin
    size = begin + kv_len
    limit = begin + kv_len
    # Two searches that take turns: of the first id that is not lower, and of the first higher one.
    for _ in range(STEPS):
        middle = (begin + size) // 2
        inside = begin < size
        lower = tl.load(ids + middle, mask=inside, other=0) < value
        begin = tl.where(inside & lower, middle + 1, begin)
        size = tl.where(inside & (lower == 0), middle, size)
        middle = (end + limit) // 2
        inside = end < limit
        higher = tl.load(ids + middle, mask=inside, other=0) > value
        end = tl.where(inside & (higher == 0), middle + 1, end)
        limit = tl.where(inside & higher, middle, limit)
    return begin, end


@triton.jit
def _of_rows(tensor, batch, row, stride_b, stride_s):
    return tl.load(tensor + batch * stride_b + row * stride_s)


@triton.jit
def _keys_of(value, ids, order, kv_len, STEPS: tl.constexpr):
    """The first and last key that has an id, and whether others lie between; ids are in order."""
    begin, end = _places_of(value, ids, kv_len, STEPS)
    first = tl.load(order + tl.minimum(begin, kv_len - 1))
    last = tl.load(order + tl.maximum(end - 1, 0))
    last = tl.where(end > begin, last, first - 1)
    return first, last, (end - begin < last - first + 1).to(tl.int32)


LENGTHS = [
    "stride_lasts_b",
    "stride_lasts_s",
    "stride_firsts_b",
    "stride_firsts_s",
    "stride_sees_b",
    "stride_sees_s",
    "stride_gaps_b",
    "stride_gaps_s",
    "stride_row_ids_b",
    "stride_row_ids_s",
    "stride_ids_b",
    "last_offset",
    "first_offset",
    "own_offset",
    "q_len",
    "kv_len",
    "q_blocks",
    "blocks",
]


@triton.jit(do_not_specialize=LENGTHS)
def _row_blocks(
    key_valid,
    rows,
    composites,
    samples,
    query_blocks,
    row_valid,
    lasts,
    firsts,
    sees,
    gaps,
    row_ids,
    ids,
    order,
    found,
    nearest,
    stride_lasts_b,
    stride_lasts_s,
    stride_firsts_b,
    stride_firsts_s,
    stride_sees_b,
    stride_sees_s,
    stride_gaps_b,
    stride_gaps_s,
    stride_row_ids_b,
    stride_row_ids_s,
    stride_ids_b,
    last_offset,
    first_offset,
    own_offset,
    q_len,
    kv_len,
    q_blocks,
    blocks,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    OWN: tl.constexpr,
    LAST: tl.constexpr,
    LAST_OFFSET: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_OFFSET: tl.constexpr,
    SEES: tl.constexpr,
    GAPS: tl.constexpr,
    EQUAL: tl.constexpr,
    HOLES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The rows of one query block, those of them that stand for others, and the block itself."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    exists = row < q_len
    # After the last row there is only that one again.
    own = tl.minimum(row, q_len - 1).to(tl.int64)
    low = tl.zeros_like(own)
    high = low + kv_len - 1
    gap = tl.zeros_like(own).to(tl.int32)
    if LAST_OFFSET:
        high = tl.minimum(high, own + last_offset)
    if FIRST_OFFSET:
        low = tl.maximum(low, own + first_offset)
    if LAST:
        high = tl.minimum(high, _of_rows(lasts, batch, own, stride_lasts_b, stride_lasts_s))
    if FIRST:
        low = tl.maximum(low, _of_rows(firsts, batch, own, stride_firsts_b, stride_firsts_s))
    if SEES:
        sees_some = _of_rows(sees, batch, own, stride_sees_b, stride_sees_s) > 0
        high = tl.where(sees_some, high, -1)
    if GAPS:
        gap = (_of_rows(gaps, batch, own, stride_gaps_b, stride_gaps_s) > 0).to(tl.int32)
    if EQUAL:
        value = _of_rows(row_ids, batch, own, stride_row_ids_b, stride_row_ids_s)
        of_batch = batch * stride_ids_b
        first, last, others = _keys_of(value, ids + of_batch, order + of_batch, kv_len, STEPS)
        low, high, gap = tl.maximum(low, first), tl.minimum(high, last), gap | others
    high = tl.minimum(high, kv_len - 1)
    if HOLES:
        low, high = tl.minimum(tl.maximum(low, 0), kv_len), tl.maximum(high, -1)
        near = nearest + batch * blocks * BLOCK * 2
        line = found + batch * blocks * 3
        low = _following(low, near, line, kv_len, blocks, BLOCK, 2).to(tl.int64)
        high = _preceding(high, near, line, BLOCK, 2).to(tl.int64)
    # Of rows that see no key: Skv and -1.
    first = tl.where(low <= high, low, kv_len).to(tl.int32)
    last = tl.where(low <= high, high, -1).to(tl.int32)
    gap *= (first <= last).to(tl.int32)
    seen = (first <= last) & exists
    line = batch * q_len + row
    tl.store(rows + line * 2, first, mask=exists)
    tl.store(rows + line * 2 + 1, last, mask=exists)
    tl.store(row_valid + line, seen.to(tl.uint8), mask=exists)
    apart = seen
    if OWN:
        key = own + own_offset
        at = key_valid + batch * kv_len + tl.minimum(key, kv_len - 1)
        apart = seen & ((tl.load(at) == 0) | (first > key) | (last < key))
    lowest, highest = tl.min(first, 0), tl.max(last, 0)
    highest_first, lowest_last = tl.max(first, 0), tl.min(last, 0)
    some = tl.max(seen.to(tl.int32), 0)
    pieces = tl.max(gap, 0)
    at = query_blocks + (batch * q_blocks + block) * 6
    tl.store(at, lowest)
    tl.store(at + 1, highest)
    tl.store(at + 2, tl.where(pieces > 0, kv_len, highest_first))
    tl.store(at + 3, tl.where(pieces > 0, -1, lowest_last))
    tl.store(at + 4, tl.max(apart.to(tl.int32), 0))
    # `_last_blocks` makes of it whether all is kept.
    tl.store(at + 5, some + pieces * 2)
    if GROUP > 0:
        groups: tl.constexpr = BLOCK // GROUP
        low = tl.min(tl.reshape(tl.where(exists, first, kv_len), [groups, GROUP]), 1)
        high = tl.max(tl.reshape(tl.where(exists, last, -1), [groups, GROUP]), 1)
        count = tl.sum(tl.reshape(seen.to(tl.int32), [groups, GROUP]), 1)
        line = (batch * q_blocks + block) * groups + tl.arange(0, groups)
        tl.store(composites + line * 3, low)
        tl.store(composites + line * 3 + 1, high)
        tl.store(composites + line * 3 + 2, count)
    if STEP > 0:
        # The last row of so many stands for them.
        steps: tl.constexpr = BLOCK // STEP
        stands = row % STEP == STEP - 1
        count = tl.minimum(tl.maximum(q_len - row + STEP - 1, 0), STEP)
        line = (batch * q_blocks + block) * steps + tl.arange(0, BLOCK) // STEP
        tl.store(samples + line * 3, first, mask=stands)
        tl.store(samples + line * 3 + 1, last, mask=stands)
        tl.store(samples + line * 3 + 2, count * (first <= last).to(tl.int32), mask=stands)


@triton.jit(do_not_specialize=["q_blocks", "last_blocks"])
def _last_blocks(query_blocks, q_blocks, last_blocks, STEP: tl.constexpr):
    """Which query blocks keep all: rows with gaps, and the last ones of which a row sees a key."""
    line = query_blocks + tl.program_id(0).to(tl.int64) * q_blocks * 6 + 5
    after = 0
    steps = (q_blocks + STEP - 1) // STEP
    for step in range(0, steps):
        block = (steps - 1 - step) * STEP + tl.arange(0, STEP)
        exists = block < q_blocks
        known = tl.load(line + block * 6, mask=exists, other=0)
        some = known % 2
        total = tl.sum(some, 0)
        # So many from this one on.
        order = total - tl.cumsum(some, 0) + some + after
        keeps = ((some > 0) & (order <= last_blocks)) | (known > 1)
        tl.store(line + block * 6, keeps.to(tl.int32), mask=exists)
        after += total


_launch_key_blocks = Launch(_key_blocks)
_launch_nearest_blocks = Launch(_nearest_blocks)
_launch_row_blocks = Launch(_row_blocks)
_launch_last_blocks = Launch(_last_blocks)


def make_tables(
    ends: RowEnds,
    logs: Tensor,
    geometry: BlockGeometry,
    *,
    batch: int,
    c_q: int,
    c_k: int,
    sampled_queries: int,
    sink_blocks: int,
    last_query_blocks: int,
) -> IntervalTables:
    """`key_intervals.interval_tables` on the GPU.

    Args:
        ends: What the mask says of rows and keys.
        logs: Log2 of the share of a group that is valid, by how many keys are: float32 [c_k + 1].
        geometry: The block grid.
        batch: Bm, batch elements that differ.
        c_q: See `interval_tables`, as what follows.
        c_k: Keys per composite key.
        sampled_queries: Rows of a block that meet every key.
        sink_blocks: First key blocks, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.

    Returns:
        The tables.
    """
    q_len, kv_len, size = geometry.q_len, geometry.kv_len, geometry.block_size
    q_blocks, kv_blocks = geometry.num_q_blocks, geometry.num_kv_blocks

    def integers(*shape: int) -> Tensor:
        return empty(logs, (batch, *shape), torch.int32)

    # Not recorded, and not written where nothing is scored.
    none = logs.new_empty((batch, 0, ROW_FIELDS), dtype=torch.int32)
    tables = IntervalTables(
        rows=integers(q_len, 2),
        composites=integers(q_blocks * (size // c_q), ROW_FIELDS) if c_q else none,
        samples=integers(q_blocks * sampled_queries, ROW_FIELDS) if sampled_queries else none,
        blocks=integers(q_blocks, BLOCK_FIELDS),
        key_blocks=integers(kv_blocks),
        key_weights=empty(logs, (batch, kv_blocks * (size // c_k)), torch.float32),
        key_valid=empty(logs, (batch, kv_len), torch.bool),
        row_valid=empty(logs, (batch, q_len), torch.bool),
    )
    key_valid, row_valid = (t.view(torch.uint8) for t in (tables.key_valid, tables.row_valid))
    holes = ends.key_valid is not None
    found = integers(kv_blocks, KEY_FIELDS) if holes else tables.blocks
    nearest = integers(kv_blocks * size, 2) if holes else tables.blocks
    valid, valid_b, valid_s = _given(ends.key_valid, logs)
    _launch_key_blocks(
        (kv_blocks, batch, 1),
        valid,
        logs,
        key_valid,
        tables.key_weights,
        tables.key_blocks,
        found,
        nearest,
        valid_b,
        valid_s,
        kv_len,
        kv_blocks,
        sink_blocks,
        BLOCK=size,
        GROUP=c_k,
        HOLES=holes,
        num_warps=4,
        enable_fp_fusion=True,
    )
    if holes:
        _launch_nearest_blocks(
            (batch, 1, 1),
            found,
            tables.key_blocks,
            kv_len,
            kv_blocks,
            sink_blocks,
            STEP=min(STEP_BLOCKS, power_of_two(kv_blocks)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    rows = (ends.lasts, ends.firsts, ends.sees, ends.gaps, ends.row_ids)
    given = [_given(tensor, logs) for tensor in rows]
    ids, ids_b, _ = _given(ends.ids, logs)
    order, _, _ = _given(ends.order, logs)
    own = geometry.causal_offset
    if own is None and q_len == kv_len:
        own = 0
    _launch_row_blocks(
        (q_blocks, batch, 1),
        key_valid,
        tables.rows,
        tables.composites if c_q else tables.rows,
        tables.samples if sampled_queries else tables.rows,
        tables.blocks,
        row_valid,
        *(tensor for tensor, _, _ in given),
        ids,
        order,
        found,
        nearest,
        *(stride for _, *strides in given for stride in strides),
        ids_b,
        ends.last_offset or 0,
        ends.first_offset or 0,
        own or 0,
        q_len,
        kv_len,
        q_blocks,
        kv_blocks,
        BLOCK=size,
        GROUP=c_q,
        STEP=size // sampled_queries if sampled_queries else 0,
        OWN=own is not None,
        LAST=ends.lasts is not None,
        LAST_OFFSET=ends.last_offset is not None,
        FIRST=ends.firsts is not None,
        FIRST_OFFSET=ends.first_offset is not None,
        SEES=ends.sees is not None,
        GAPS=ends.gaps is not None,
        EQUAL=ends.ids is not None,
        HOLES=holes,
        STEPS=kv_len.bit_length() if ends.ids is not None else 0,
        num_warps=4,
        enable_fp_fusion=True,
    )
    _launch_last_blocks(
        (batch, 1, 1),
        tables.blocks,
        q_blocks,
        last_query_blocks,
        STEP=min(STEP_BLOCKS, power_of_two(q_blocks)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return tables


def _given(tensor: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int, int]:
    """A tensor [1 or Bm, 1 or S] as kernels take it, and its strides; 0 where all are alike."""
    if tensor is None:
        return otherwise, 0, 0
    batch_step, step = (
        0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )
    given = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
    return given, batch_step, step
