"""Block masses on the GPU: every row's summed exponentials over every block of keys.

The logits of a tile live and die in registers. Symbols: R rows of a query block (its composite
heads times its groups), C composite keys of a key block, Nk key blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import BlockGeometry
from ..key_intervals import IntervalTables
from .gpu import gpu_of
from .launch import Launch
from .recording import empty
from .scratch import Masses, Rows, batch_stride, power_of_two, reach_of

# Numbers of a token that products in float32 take at a time: threads hold all that they multiply.
DEPTH = tl.constexpr(16)


@triton.jit
def _logits(
    query,
    keys,
    place,
    tile,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    MAPPED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Logits with a tile of the keys that are at ``place``: batch element, head, strides, size.

    ``query`` holds the rows, or with EXACT where they begin. Of keys in pages of PAGE, ``table``
    has the sequence's pages in order, which stand where else batch elements do.
    """
    batch, head, stride_batch, stride_head, stride, rows, head_dim, table = place
    start = tile * COLS
    if PAGE > 0:
        batch = tl.load(table + start // PAGE)
        start = start % PAGE
    if MAPPED:
        key = keys.load([batch, head, start, 0]).reshape(COLS, WIDTH)
        logits = tl.dot(query, key.T)
    else:
        row = start + tl.arange(0, COLS)
        first = keys + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
        at = first + row[:, None].to(tl.int64) * stride
        exists = (row < rows)[:, None]
        if EXACT:
            logits = tl.zeros([ROWS, COLS], dtype=tl.float32)
            for done in range(0, WIDTH, DEPTH):
                width = done + tl.arange(0, DEPTH)
                inside = (width < head_dim)[None, :]
                part = tl.load(query + width[None, :], mask=inside, other=0.0)
                key = tl.load(at + width[None, :], mask=exists & inside, other=0.0)
                logits = tl.dot(part, key.T, logits, input_precision="ieee")
        else:
            width = tl.arange(0, WIDTH)
            inside = (width < head_dim)[None, :]
            key = tl.load(at + width[None, :], mask=exists & inside, other=0.0)
            logits = tl.dot(query, key.T)
    return logits


@triton.jit
def _weigh(logits, column, weights, columns, KEY_GROUP: tl.constexpr):
    """Adds the weights of columns; hides those without any valid key."""
    if KEY_GROUP > 1:
        weight = tl.load(weights + column, mask=column < columns, other=float("-inf"))
        # After the addition: what is hidden stays hidden, a NaN too.
        return tl.where((weight > float("-inf"))[None, :], logits + weight[None, :], float("-inf"))
    valid = tl.load(weights + column, mask=column < columns, other=0)
    return tl.where((valid > 0)[None, :], logits, float("-inf"))


@triton.jit
def _mask(
    logits,
    column,
    low,
    high,
    weights,
    columns,
    kv_len,
    KEY_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """Hides columns that do not exist or that a row does not see, from ``low`` to ``high``.

    Triton can call no method: this is `BlockGeometry.sees` for groups of keys.
    """
    first = (column * KEY_GROUP)[None, :]
    if INTERVALS:
        logits = _weigh(logits, column, weights, columns, KEY_GROUP)
        seen = (first <= high[:, None]) & (first + KEY_GROUP > low[:, None])
    else:
        seen = (column < columns)[None, :]
        if KEY_GROUP > 1:
            # The last may stand for fewer keys.
            count = tl.minimum(tl.maximum(kv_len - column * KEY_GROUP, 1), KEY_GROUP)
            logits += tl.log2(count.to(tl.float32) / KEY_GROUP)[None, :]
        if CAUSAL:
            seen = seen & (first <= high[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _held(weights, ROWS: tl.constexpr, COLS: tl.constexpr, HELD: tl.constexpr):
    """Sums over the columns of each of HELD blocks: the blocks' first columns come first."""
    return tl.sum(tl.reshape(weights, [ROWS, COLS // HELD, HELD]), 1)


# Sums above it are computed again: parts of them may be added, and divided by, in float32.
MOST_TOTAL = tl.constexpr(2.0**100)


@triton.jit
def _score_rows(
    program,
    split,
    tiles,
    count,
    queries,
    keys,
    out,
    totals,
    bounds,
    weights,
    block_bounds,
    table,
    stride_query,
    stride_key_batch,
    stride_key_head,
    stride_key,
    stride_bounds,
    stride_weights,
    first_row,
    rows,
    key_rows,
    columns,
    block_rows,
    stride_blocks,
    first_head,
    blocks,
    q_len,
    kv_len,
    offset,
    kv_heads,
    head_dim,
    scale,
    BLOCK: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERVALS: tl.constexpr,
    MAPPED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Writes summed exponentials: out[head, key block, row].

    ``program`` stands for a tile of rows and a head, of ``tiles`` and ``count``, ``split`` for a
    range of keys.

    ``block_rows`` rows of ``queries`` belong to a query block; ``ROW_GROUP`` query tokens to one
    of them, ``KEY_GROUP`` keys to one of ``keys``. All are relative to the greatest logit of the
    first tile. Where a row outgrows it too far, the program computes its sums again, relative to
    the greatest logit of its own keys, and writes how far that lies above, as `Masses` says.

    With INTERVALS a row sees the valid keys between its ``bounds``, `key_intervals.KeyIntervals`,
    and nothing else is read of its batch element.

    With PAGE the keys of one sequence lie in pages of so many, named by ``table``.
    """
    # The last rows see most: those of all heads go first.
    tile_row = tiles - 1 - program // count
    slot = program % count
    head = first_head + slot
    row = tile_row * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    groups: tl.constexpr = BLOCK // ROW_GROUP
    per_block: tl.constexpr = BLOCK // KEY_GROUP
    # A step covers at least one key block, in tiles of COLS columns.
    STEP: tl.constexpr = COLS if per_block < COLS else per_block
    tiles_per_step: tl.constexpr = STEP // COLS
    held: tl.constexpr = STEP // per_block
    absolute = first_row + row
    last = (absolute // block_rows) * BLOCK + (absolute % groups + 1) * ROW_GROUP - 1
    high = tl.minimum(last, q_len - 1) + offset
    low = high * 0
    # Rows that do not exist repeat the last one.
    at = first_row + tl.minimum(row, rows - 1)
    query = queries + head.to(tl.int64) * stride_query + at[:, None].to(tl.int64) * head_dim
    if not EXACT:
        query = tl.load(query + width[None, :], mask=(width < head_dim)[None, :], other=0.0)
    batch = head // kv_heads
    kv_head = head % kv_heads
    at_keys = (
        batch, kv_head, stride_key_batch, stride_key_head, stride_key, key_rows, head_dim, table,
    )  # fmt: skip
    if INTERVALS:
        group = absolute // block_rows * groups + absolute % groups
        at_bounds = bounds + batch * stride_bounds + group * 3
        low = tl.load(at_bounds, mask=row < rows, other=kv_len)
        high = tl.load(at_bounds + 1, mask=row < rows, other=-1)
        weights += batch * stride_weights
    out += slot.to(tl.int64) * blocks * rows
    # The keys of a block lie ``held`` columns apart, and so in the registers of one thread.
    column = tl.arange(0, COLS) % held * per_block + tl.arange(0, COLS) // held

    # Tiles whose columns all exist and are seen whole by all rows, and tiles that some row sees.
    first_whole = 0
    first = 0
    whole = columns // STEP
    if kv_len % KEY_GROUP != 0:
        whole = (columns - 1) // STEP
    steps = tl.cdiv(columns, STEP)
    if INTERVALS:
        # All that is read of a query block, though some rows of it are in another program.
        at_block = block_bounds + batch * stride_blocks + absolute // block_rows * 6
        begins = tl.load(at_block, mask=row < rows, other=kv_len)
        ends = tl.load(at_block + 1, mask=row < rows, other=-1)
        steps = tl.minimum(steps, (tl.max(ends, 0) + KEY_GROUP * STEP) // (KEY_GROUP * STEP))
        first = tl.minimum(tl.min(begins, 0) // (KEY_GROUP * STEP), steps)
        highest = tl.max(tl.where(row < rows, low, 0), 0)
        lowest = tl.min(tl.where(row < rows, high, kv_len - 1), 0)
        first_whole = tl.cdiv(highest, KEY_GROUP * STEP)
        whole = tl.maximum((lowest + 1) // (KEY_GROUP * STEP), first_whole)
    elif CAUSAL:
        # The rows of a tile stand in order of their query blocks.
        lowest = (first_row + tile_row * ROWS) // block_rows * BLOCK + ROW_GROUP - 1
        lowest = tl.minimum(lowest, q_len - 1) + offset
        final = tl.minimum(tile_row * ROWS + ROWS, rows) - 1
        highest = tl.minimum((first_row + final) // block_rows * BLOCK + BLOCK, q_len) - 1 + offset
        whole = tl.minimum(whole, (lowest // KEY_GROUP + 1) // STEP)
        steps = tl.minimum(steps, highest // KEY_GROUP // STEP + 1)
    share = tl.cdiv(steps - first, SPLITS)
    begin = tl.minimum(first + split * share, steps)
    end = tl.minimum(begin + share, steps)
    enter = tl.minimum(tl.maximum(first_whole, begin), end)
    middle = tl.minimum(tl.maximum(whole, enter), end)

    # The tile that holds the first key of a row; without INTERVALS column 0 is seen by every row.
    home = low // (KEY_GROUP * COLS)
    if INTERVALS:
        sees = high >= low
        missing = sees
        peak = tl.zeros([ROWS], dtype=tl.float32)
        tile = tl.max(tl.where(missing, home, -1), 0)
        while tile >= 0:
            logits = _logits(query, keys, at_keys, tile, ROWS, COLS, WIDTH, EXACT, MAPPED, PAGE)
            logits *= scale
            at_column = tile * COLS + column
            logits = _mask(
                logits, at_column, low, high, weights, columns, kv_len,
                KEY_GROUP, CAUSAL, INTERVALS,
            )  # fmt: skip
            found = tl.max(logits, 1)
            # A row's own tile, or a later one of another row that it sees as well.
            taken = missing & ((home == tile) | (found > float("-inf")))
            peak = tl.where(taken, found, peak)
            home = tl.where(taken, tile, home)
            missing = missing & (taken == 0)
            tile = tl.max(tl.where(missing, home, -1), 0)
    else:
        logits = _logits(query, keys, at_keys, 0, ROWS, COLS, WIDTH, EXACT, MAPPED, PAGE)
        logits *= scale
        logits = _mask(
            logits, column, low, high, weights, columns, kv_len, KEY_GROUP, CAUSAL, INTERVALS
        )
        peak = tl.max(logits, 1)
    total = tl.zeros([ROWS, held], dtype=tl.float32)
    in_rows = (row < rows)[:, None]
    place = out + (enter * held + tl.arange(0, held))[None, :] * rows + row[:, None]
    # Sums of a block whose tiles are not all done yet.
    mass = tl.zeros([ROWS, held], dtype=tl.float32)
    for tile in range(enter * tiles_per_step, middle * tiles_per_step):
        logits = _logits(query, keys, at_keys, tile, ROWS, COLS, WIDTH, EXACT, MAPPED, PAGE)
        if INTERVALS:
            logits = _weigh(logits * scale, tile * COLS + column, weights, columns, KEY_GROUP)
            part = _held(tl.exp2(logits - peak[:, None]), ROWS, COLS, held)
        else:
            part = _held(tl.exp2(logits * scale - peak[:, None]), ROWS, COLS, held)
        total += part
        if tiles_per_step == 1:
            tl.store(place, part.to(out.dtype.element_ty), mask=in_rows)
            place += held * rows
        else:
            mass = tl.where(tile % tiles_per_step == 0, part, mass + part)
            done = tile % tiles_per_step == tiles_per_step - 1
            tl.store(place, mass.to(out.dtype.element_ty), mask=in_rows & done)
            place += tl.where(done, held * rows, 0)
    # What is left, before the whole tiles and after them.
    ahead = (enter - begin) * tiles_per_step
    for turn in range(ahead + (end - middle) * tiles_per_step):
        tile = begin * tiles_per_step + turn
        tile += tl.where(turn < ahead, 0, (middle - enter) * tiles_per_step)
        logits = _logits(query, keys, at_keys, tile, ROWS, COLS, WIDTH, EXACT, MAPPED, PAGE)
        logits *= scale
        at_column = tile * COLS + column
        logits = _mask(
            logits, at_column, low, high, weights, columns, kv_len, KEY_GROUP, CAUSAL, INTERVALS
        )
        part = _held(tl.exp2(logits - peak[:, None]), ROWS, COLS, held)
        total += part
        mass = tl.where(tile % tiles_per_step == 0, part, mass + part)
        block = tile // tiles_per_step * held + tl.arange(0, held)
        stored = in_rows & (block < blocks)[None, :]
        place = out + block[None, :] * rows + row[:, None]
        tl.store(place, mass.to(out.dtype.element_ty), mask=stored)
    sums = tl.sum(total, 1)
    at_total = totals + (slot * 4 * SPLITS + split).to(tl.int64) * rows + row
    # What holds that tile sums to 1 or more, but for rounding of logits beyond 2 ** 24.
    holds = (home >= begin * tiles_per_step) & (home < end * tiles_per_step)
    if INTERVALS:
        holds = holds & sees
    least = tl.where(holds, 0.5, -1.0)
    if tl.max(((sums > MOST_TOTAL) | (sums < least)).to(tl.int32), 0) > 0:
        # Twice over the tiles: the greatest logits, then the sums relative to them.
        count = (end - begin) * tiles_per_step
        raised = peak
        for turn in range(2 * count):
            tile = begin * tiles_per_step + turn % count
            logits = _logits(query, keys, at_keys, tile, ROWS, COLS, WIDTH, EXACT, MAPPED, PAGE)
            logits *= scale
            at_column = tile * COLS + column
            logits = _mask(
                logits, at_column, low, high, weights, columns, kv_len,
                KEY_GROUP, CAUSAL, INTERVALS,
            )  # fmt: skip
            raised = tl.where(turn < count, tl.maximum(raised, tl.max(logits, 1)), raised)
            part = _held(tl.exp2(logits - raised[:, None]), ROWS, COLS, held)
            total = tl.where(turn <= count, part, total + part)
            mass = tl.where(tile % tiles_per_step == 0, part, mass + part)
            block = tile // tiles_per_step * held + tl.arange(0, held)
            # Nothing at the first turn.
            stored = in_rows & (block < tl.where(turn < count, 0, blocks))[None, :]
            place = out + block[None, :] * rows + row[:, None]
            tl.store(place, mass.to(out.dtype.element_ty), mask=stored)
        sums = tl.sum(total, 1)
        if SPLITS > 1:
            sums = -sums
            tl.store(at_total + SPLITS * rows, raised - peak, mask=row < rows)
            span = row * 0.0 + share * held
            tl.store(at_total + 2 * SPLITS * rows, span, mask=row < rows)
            start = row * 0.0 + first * held
            tl.store(at_total + 3 * SPLITS * rows, start, mask=row < rows)
    tl.store(at_total, sums, mask=row < rows)


# Of what is scored, and of the call.
LENGTHS = [
    "stride_bounds",
    "stride_weights",
    "first_row",
    "key_rows",
    "columns",
    "block_rows",
]
CALL_LENGTHS = [
    "stride_blocks",
    "first_head",
    "blocks",
    "q_len",
    "kv_len",
    "offset",
    "kv_heads",
]


@triton.jit(do_not_specialize=LENGTHS + CALL_LENGTHS, do_not_specialize_on_alignment=["table"])
def _score(
    queries,
    keys,
    out,
    totals,
    bounds,
    weights,
    stride_query,
    stride_key_batch,
    stride_key_head,
    stride_key,
    stride_bounds,
    stride_weights,
    first_row,
    rows,
    key_rows,
    columns,
    block_rows,
    block_bounds,
    table,
    stride_blocks,
    first_head,
    blocks,
    q_len,
    kv_len,
    offset,
    kv_heads,
    head_dim,
    scale,
    ROW_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERVALS: tl.constexpr,
    MAPPED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Scores of sampled rows, or of composite ones."""
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    _score_rows(
        program, tl.program_id(1), tl.num_programs(0), tl.num_programs(2),
        queries, keys, out, totals, bounds, weights, block_bounds, table, stride_query,
        stride_key_batch, stride_key_head, stride_key, stride_bounds, stride_weights, first_row,
        rows, key_rows, columns, block_rows, stride_blocks, first_head, blocks, q_len, kv_len,
        offset, kv_heads, head_dim, scale,
        BLOCK, ROW_GROUP, KEY_GROUP, CAUSAL, EXACT, ROWS, COLS, WIDTH, SPLITS, INTERVALS, MAPPED,
        PAGE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[prefix + name for prefix in ("fine_", "coarse_") for name in LENGTHS]
    + CALL_LENGTHS
    + ["count"]
)
def _score_both(
    fine_queries,
    fine_keys,
    fine_out,
    fine_totals,
    fine_bounds,
    fine_weights,
    fine_stride_query,
    fine_stride_key_batch,
    fine_stride_key_head,
    fine_stride_key,
    fine_stride_bounds,
    fine_stride_weights,
    fine_first_row,
    fine_rows,
    fine_key_rows,
    fine_columns,
    fine_block_rows,
    coarse_queries,
    coarse_keys,
    coarse_out,
    coarse_totals,
    coarse_bounds,
    coarse_weights,
    coarse_stride_query,
    coarse_stride_key_batch,
    coarse_stride_key_head,
    coarse_stride_key,
    coarse_stride_bounds,
    coarse_stride_weights,
    coarse_first_row,
    coarse_rows,
    coarse_key_rows,
    coarse_columns,
    coarse_block_rows,
    block_bounds,
    stride_blocks,
    first_head,
    blocks,
    q_len,
    kv_len,
    offset,
    kv_heads,
    head_dim,
    scale,
    count,
    FINE_ROW_GROUP: tl.constexpr,
    FINE_KEY_GROUP: tl.constexpr,
    FINE_COLS: tl.constexpr,
    FINE_SPLITS: tl.constexpr,
    COARSE_ROW_GROUP: tl.constexpr,
    COARSE_KEY_GROUP: tl.constexpr,
    COARSE_COLS: tl.constexpr,
    COARSE_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERVALS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Scores of sampled rows, which take longer and go first, and of composite ones."""
    program = tl.program_id(0)
    tiles = tl.cdiv(fine_rows, ROWS)
    behind = program - tiles * FINE_SPLITS * count
    if behind < 0:
        split = program // tiles % FINE_SPLITS
        _score_rows(
            program // (tiles * FINE_SPLITS) * tiles + program % tiles, split, tiles, count,
            fine_queries, fine_keys, fine_out, fine_totals, fine_bounds, fine_weights,
            block_bounds, fine_queries, fine_stride_query, fine_stride_key_batch,
            fine_stride_key_head, fine_stride_key, fine_stride_bounds, fine_stride_weights,
            fine_first_row, fine_rows, fine_key_rows, fine_columns, fine_block_rows,
            stride_blocks, first_head, blocks, q_len, kv_len, offset, kv_heads, head_dim, scale,
            BLOCK, FINE_ROW_GROUP, FINE_KEY_GROUP, CAUSAL, EXACT, ROWS, FINE_COLS, WIDTH,
            FINE_SPLITS, INTERVALS, MAPPED, 0,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(coarse_rows, ROWS)
        split = behind // tiles % COARSE_SPLITS
        _score_rows(
            behind // (tiles * COARSE_SPLITS) * tiles + behind % tiles, split, tiles, count,
            coarse_queries, coarse_keys, coarse_out, coarse_totals, coarse_bounds,
            coarse_weights, block_bounds, coarse_queries, coarse_stride_query,
            coarse_stride_key_batch, coarse_stride_key_head, coarse_stride_key,
            coarse_stride_bounds, coarse_stride_weights, coarse_first_row, coarse_rows,
            coarse_key_rows, coarse_columns, coarse_block_rows, stride_blocks, first_head,
            blocks, q_len, kv_len, offset, kv_heads, head_dim, scale,
            BLOCK, COARSE_ROW_GROUP, COARSE_KEY_GROUP, CAUSAL, EXACT, ROWS, COARSE_COLS, WIDTH,
            COARSE_SPLITS, INTERVALS, MAPPED, 0,
        )  # fmt: skip


_launch, _launch_both = Launch(_score), Launch(_score_both)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes at a time, and with what."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Options of the compilation; AMD's knows no limit of registers."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        # Triton's default changes from version to version.
        fused = {"enable_fp_fusion": True}
        return {"num_warps": self.warps, "num_stages": self.stages, **fused, **limit}


# Up to so many, smaller tiles keep more multiprocessors busy.
FEW_ROWS = 8192


def tile_of(tokens: Tensor, rows: int) -> Tile:
    """The tile for ``rows`` rows of tokens of this dtype and head_dim; columns are not by rows."""
    gpu = gpu_of(tokens.device)
    width = power_of_two(tokens.shape[-1])
    few = rows <= FEW_ROWS
    if gpu.is_amd:
        return Tile(64, 64, 4, 2)
    if tokens.element_size() == 4:
        return Tile(64, 64, 4, 2, 200)
    if not gpu.has_wide_products:
        # Of 32 rows a warp has, what it reads of keys serves twice as many products as of 16.
        stages = 3 if width <= 64 or few else 2
        return Tile(64, 32, 4, stages) if few or width > 128 else Tile(128, 32, 4, stages)
    if width > 128:
        return Tile(128, 64, 8, 2, 128 if gpu.capability < (10, 0) else 200)
    if gpu.capability >= (10, 0):
        return Tile(64, 64, 4, 3, 168)
    if few:
        # Above 64 wide, shared memory has room for three programs: registers for more are free.
        return Tile(64, 64, 4, 3, 128 if width <= 64 else 168)
    # Above 64 wide, shared memory leaves room for two programs, and so for their registers.
    return Tile(128, 64, 8, 3, 80 if width <= 64 else 128)


def held_blocks(tokens: Tensor, per_block: int) -> int:
    """Key blocks in a tile of composite keys, which `pool` must interleave."""
    return max(1, tile_of(tokens, 1).columns // per_block)


def supports_descriptor(keys: Tensor) -> bool:
    """Whether the tensor memory accelerator can address ``keys``."""
    aligned = all(stride * keys.element_size() % 16 == 0 for stride in keys.stride()[:-1])
    return keys.stride(-1) == 1 and aligned and keys.data_ptr() % 16 == 0


def supports_pages(keys: Tensor, block_size: int) -> bool:
    """Whether `score` reads keys in pages, [all pages, Hkv, page, D], where they lie."""
    columns = min(tile_of(keys, 1).columns, block_size)
    return keys.shape[2] % columns == 0 and supports_descriptor(keys)


# Enough programs to even out their differing lengths over the multiprocessors; each begins with a
# tile more, which is little beside rows of single keys.
PROGRAMS_WANTED, PROGRAMS_WANTED_OF_KEYS = 512, 2048
MOST_SPLITS = 16
# Of composite keys and many rows, where lengths share a compilation.
STEADY_SPLITS = 4


def splits_of(programs: int, tiles: int, wanted: int) -> int:
    """Into how many ranges of keys a row's work is split: a power of two.

    Args:
        programs: Programs without a split.
        tiles: Tiles of keys; a range has two or more.
        wanted: Programs that there should be.
    """
    splits = min(power_of_two(-(-wanted // programs)), MOST_SPLITS)
    while splits > max(1, tiles // 2):
        splits //= 2
    return splits


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Rows, and the keys that they meet.

    Attributes:
        queries: Composite or picked query rows of every head and query block.
        keys: [B, Hkv, C, D] keys, or composite keys, interleaved as `held_blocks` says; such as
            `supports_descriptor` accepts.
        key_group: Keys to a composite key; 1 for the keys themselves.
        columns: Composite keys that exist.
        sampled: Whether the queries were picked, not pooled.
    """

    queries: Rows
    keys: Tensor
    key_group: int
    columns: int
    sampled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Which heads and query blocks are scored, of which call; see `score`."""

    geometry: BlockGeometry
    heads: slice
    q_blocks: slice
    scale: float
    intervals: IntervalTables | None
    steady: bool = False

    def rows(self, of: Scored) -> int:
        """Rows of a head."""
        block_rows = of.queries.tokens.shape[1] // self.geometry.num_q_blocks
        return block_rows * (self.q_blocks.stop - self.q_blocks.start)

    @property
    def count(self) -> int:
        """Heads."""
        return self.heads.stop - self.heads.start

    def tile(self, of: Scored) -> Tile:
        """What a program computes at a time."""
        tile = tile_of(of.keys, self.rows(of) * self.count)
        if of.key_group > 1:
            return tile
        # Keys themselves are not interleaved: a tile holds those of one block.
        return replace(tile, columns=min(tile.columns, self.geometry.block_size))

    def splits(self, of: Scored) -> int:
        """Programs that share a row."""
        tile = self.tile(of)
        if self.steady:
            return MOST_SPLITS if of.key_group == 1 or tile.rows <= 64 else STEADY_SPLITS
        programs = -(-self.rows(of) // tile.rows) * self.count
        wanted = PROGRAMS_WANTED_OF_KEYS if of.key_group == 1 else PROGRAMS_WANTED
        return splits_of(programs, -(-of.columns // tile.columns), wanted)

    def programs(self, of: Scored) -> tuple[int, int, int]:
        """Tiles of rows, splits and heads."""
        return -(-self.rows(of) // self.tile(of).rows), self.splits(of), self.count

    def masses(self, of: Scored) -> Masses:
        """Room for the result."""
        shape = (self.count, reach_of(self.geometry, self.q_blocks), self.rows(of))
        dtype = torch.float32 if of.keys.dtype == torch.float32 else torch.bfloat16
        totals = (self.count, 4, self.splits(of), self.rows(of))
        return Masses(empty(of.keys, shape, dtype), empty(of.keys, totals, torch.float32))

    def arguments(self, of: Scored, masses: Masses) -> list[Any]:
        """Those of the kernels that say what is scored."""
        queries, keys = of.queries.tokens, of.keys
        bounds = weights = queries
        if self.intervals is not None:
            tables = self.intervals
            bounds = tables.samples if of.sampled else tables.composites
            valid = tables.key_valid.view(torch.uint8)
            weights = valid if of.key_group == 1 else tables.key_weights
        mapped = _is_mapped(keys)
        block_rows = queries.shape[1] // self.geometry.num_q_blocks
        box = [1, 1, self.tile(of).columns, power_of_two(keys.shape[3])]
        return [
            queries,
            TensorDescriptor(keys, keys.shape, keys.stride(), box) if mapped else keys,
            masses.blocks,
            masses.totals,
            bounds,
            weights,
            queries.stride(0),
            *((0, 0, 0) if mapped else keys.stride()[:3]),
            batch_stride(bounds),
            batch_stride(weights),
            self.q_blocks.start * block_rows,
            self.rows(of),
            keys.shape[2],
            of.columns,
            block_rows,
        ]

    def constants(self, of: Scored) -> dict[str, int]:
        """Those of the kernels that say what is scored."""
        return {
            "ROW_GROUP": of.queries.size,
            "KEY_GROUP": of.key_group,
            "COLS": self.tile(of).columns,
            "SPLITS": self.splits(of),
        }

    def block_bounds(self, of: Scored) -> Tensor:
        """The table of query blocks, or any tensor."""
        return of.queries.tokens if self.intervals is None else self.intervals.blocks

    def call_arguments(self, of: Scored) -> list[Any]:
        """Those of the kernels that say of which call."""
        geometry = self.geometry
        return [
            batch_stride(self.block_bounds(of)),
            self.heads.start,
            reach_of(geometry, self.q_blocks),
            geometry.q_len,
            geometry.kv_len,
            geometry.causal_offset or 0,
            of.keys.shape[1],
            of.keys.shape[3],
            self.scale * math.log2(math.e),
        ]

    def call_constants(self, of: Scored) -> dict[str, Any]:
        """Those of the kernels that say of which call, and how they are compiled."""
        return {
            "BLOCK": self.geometry.block_size,
            "CAUSAL": self.geometry.causal_offset is not None,
            "EXACT": of.keys.dtype == torch.float32,
            "ROWS": self.tile(of).rows,
            "WIDTH": power_of_two(of.keys.shape[3]),
            "INTERVALS": self.intervals is not None,
            "MAPPED": _is_mapped(of.keys),
        }


def _is_mapped(keys: Tensor) -> bool:
    """Whether a unit of its own reads the keys."""
    return gpu_of(keys.device).reads_tensor_maps and keys.dtype != torch.float32


def score(
    scored: Scored,
    *,
    geometry: BlockGeometry,
    heads: slice,
    q_blocks: slice,
    scale: float,
    intervals: IntervalTables | None = None,
    table: Tensor | None = None,
) -> Masses:
    """Computes each row's summed exponentials in each key block.

    Args:
        scored: Rows and keys.
        geometry: The block grid.
        heads: Which of the B * Hkv key heads.
        q_blocks: Which query blocks.
        scale: Factor on the logits, above 0.
        intervals: What the geometry's mask hides, where it has one.
        table: int32 [pages of the sequence] in order, where keys lie in pages, in which lengths
            share a compilation: work is split alike at every length. Single keys are then those of
            the cache, [all pages, Hkv, page, D], such as `supports_pages` accepts.

    Returns:
        The masses; what is hidden from a whole query block is left unset.
    """
    turn = _Turn(geometry, heads, q_blocks, scale, intervals, steady=table is not None)
    masses = turn.masses(scored)
    paged = table is not None and scored.sampled
    _launch(
        turn.programs(scored),
        *turn.arguments(scored, masses),
        turn.block_bounds(scored),
        table if paged else scored.queries.tokens,
        *turn.call_arguments(scored),
        **turn.constants(scored),
        **turn.call_constants(scored),
        PAGE=scored.keys.shape[2] if paged else 0,
        **turn.tile(scored).options(),
    )
    return masses


def score_both(
    coarse: Scored,
    fine: Scored,
    *,
    geometry: BlockGeometry,
    heads: slice,
    q_blocks: slice,
    scale: float,
    intervals: IntervalTables | None = None,
) -> tuple[Masses, Masses]:
    """`score` for composite rows and for sampled ones, in one launch where both are few."""
    turn = _Turn(geometry, heads, q_blocks, scale, intervals)
    few = max(turn.rows(coarse), turn.rows(fine)) * turn.count <= FEW_ROWS
    if not few or fine.keys.dtype == torch.float32:
        # In larger tiles, and in float32, registers do not suffice for a program that knows both.
        options: dict[str, Any] = {"geometry": geometry, "heads": heads, "q_blocks": q_blocks}
        options |= {"scale": scale, "intervals": intervals}
        return score(coarse, **options), score(fine, **options)
    masses = turn.masses(coarse), turn.masses(fine)
    parts = ("FINE_", fine), ("COARSE_", coarse)
    _launch_both(
        (sum(math.prod(turn.programs(part)) for part in (fine, coarse)), 1, 1),
        *turn.arguments(fine, masses[1]),
        *turn.arguments(coarse, masses[0]),
        turn.block_bounds(fine),
        *turn.call_arguments(fine),
        turn.count,
        **{p + name: value for p, part in parts for name, value in turn.constants(part).items()},
        **turn.call_constants(fine),
        **turn.tile(coarse).options(),
    )
    return masses
