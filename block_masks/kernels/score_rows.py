"""Block masses on the GPU: every row's summed exponentials over every block of keys.

The logits of a tile live and die in registers. Symbols: R rows of a query block (its composite
heads times its groups), C composite keys of a key block, Nk key blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
