"""What a mask tensor says of rows and keys, see `masks.read_mask`: one pass over all pairs.

Symbols: Bm the mask's batch (1 or B), Sq/Skv tokens, R parts of the rows, Nk blocks of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .nearest_keys import _following, _join_following, _join_preceding, _preceding, _write_nearest
from .recording import empty
from .scratch import power_of_two

# Rows, and keys, that one program looks at; of a row so many keys in one step.
ROWS, KEYS, WIDTH = 64, 128, 64
# What is found at once where all parts, or blocks, are gone through.
STEP = 1024
# Parts of which a program looks at a block of keys in one step.
PARTS = 16
# Of a row: its first and last visible key, and how many.
ROW_NUMBERS = 3
# Of a part of the rows: by how much a row's last key exceeds it, its first key times -1, added
# entries.
PART_NUMBERS = 3
# Of a key: the next and the one before that are valid in its block, and how many up to it.
KEY_NUMBERS = 3
# Numbers of what is true of a part: two integers and `masks.TRUTHS`.
COLUMNS = 16


@triton.jit(do_not_specialize=["stride_b", "stride_row", "row_count", "kv_len", "parts", "lowest"])
def _read_rows(
    mask,
    rows,
    seen,
    of_parts,
    stride_b,
    stride_row,
    stride_key,
    row_count,
    kv_len,
    parts,
    lowest,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
):
    """The visible keys of some rows: where they begin and end, how many, and which some row sees.

    With ADDED the entries are added to logits, and none up to ``lowest`` is visible.
    """
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = part * ROWS + tl.arange(0, ROWS)
    exists = row < row_count
    # Steps within a part fit 32 bits, and take half as many registers.
    base = mask + batch * stride_b + (part * ROWS).to(tl.int64) * stride_row
    place = tl.arange(0, ROWS)[:, None] * stride_row.to(tl.int32)
    place += tl.arange(0, WIDTH)[None, :] * stride_key
    first = tl.zeros([ROWS], dtype=tl.int32) + kv_len
    last = tl.zeros([ROWS], dtype=tl.int32) - 1
    count = tl.zeros([ROWS], dtype=tl.int32)
    added = tl.zeros([ROWS], dtype=tl.int32)
    some = seen + (batch * parts + part) * kv_len
    for start in range(0, kv_len, WIDTH):
        key = start + tl.arange(0, WIDTH)
        inside = exists[:, None] & (key < kv_len)[None, :]
        at = base + place
        if ADDED:
            entry = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            # What is no number is visible.
            visible = inside & ((entry <= lowest) == 0)
            added = tl.maximum(added, tl.max((visible & (entry != 0.0)).to(tl.int32), 1))
        else:
            visible = tl.load(at, mask=inside, other=0) > 0
        first = tl.minimum(first, tl.min(tl.where(visible, key[None, :], kv_len), 1))
        last = tl.maximum(last, tl.max(tl.where(visible, key[None, :], -1), 1))
        count += tl.sum(visible.to(tl.int32), 1)
        here = tl.max(visible.to(tl.int32), 0)
        tl.store(some + key, here.to(tl.uint8), mask=key < kv_len)
        base += WIDTH * stride_key
    place = rows + (batch * row_count + row) * 3
    tl.store(place, first, mask=exists)
    tl.store(place + 1, last, mask=exists)
    tl.store(place + 2, count, mask=exists)
    of_part = of_parts + (batch * parts + part) * 3
    tl.store(of_part, tl.max(tl.where(count > 0, last - row, -kv_len), 0))
    tl.store(of_part + 1, -tl.min(first, 0))
    tl.store(of_part + 2, tl.max(added, 0))


@triton.jit
def _highest(numbers, fields, count, least, STEP: tl.constexpr):
    """The highest of every so many numbers, or ``least``."""
    highest = least
    for start in range(0, count, STEP):
        place = start + tl.arange(0, STEP)
        found = tl.load(numbers + place * fields, mask=place < count, other=-2147483648)
        highest = tl.maximum(highest, tl.max(found, 0))
    return highest


@triton.jit(do_not_specialize=["row_count", "kv_len", "parts", "blocks", "batches"])
def _read_keys(
    seen,
    rows,
    of_parts,
    valid,
    near,
    found,
    widths,
    row_count,
    kv_len,
    parts,
    blocks,
    batches,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One block of keys: which are valid; or one part of the rows: how wide a window they have."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if block < blocks:
        key = block * KEYS + tl.arange(0, KEYS)
        is_key = key < kv_len
        here = tl.zeros([KEYS], dtype=tl.int32)
        for start in range(0, parts, PARTS):
            piece = start + tl.arange(0, PARTS)
            at = seen + (batch * parts + piece)[:, None] * kv_len + key[None, :]
            inside = (piece < parts)[:, None] & is_key[None, :]
            here = tl.maximum(here, tl.max(tl.load(at, mask=inside, other=0).to(tl.int32), 0))
        tl.store(valid + batch * kv_len + key, here.to(tl.uint8), mask=is_key)
        near_key = near + (batch * blocks * KEYS + key) * 3
        line = found + (batch * blocks + block) * 3
        _write_nearest(here > 0, key, near_key, line, kv_len)
        tl.store(near_key + 2, tl.cumsum(here, 0))
        tl.store(line + 2, tl.sum(here, 0))
    else:
        part = block - blocks
        row = part * ROWS + tl.arange(0, ROWS)
        offset = _highest(of_parts, 3, batches * parts, -kv_len, STEP)
        least = -_highest(of_parts + batch * parts * 3 + 1, 3, parts, -kv_len, STEP)
        of_row = rows + (batch * row_count + row) * 3
        first = tl.load(of_row, mask=row < row_count, other=kv_len)
        count = tl.load(of_row + 2, mask=row < row_count, other=0)
        width = tl.where((count > 0) & (first > least), row + offset - first + 1, 1)
        tl.store(widths + batch * parts + part, tl.max(width, 0))


@triton.jit(do_not_specialize=["kv_len", "blocks"])
def _join_keys(found, kv_len, blocks, STEP: tl.constexpr):
    """Over all blocks: the next valid key, the one before, and how many lie before the block."""
    line = found + tl.program_id(0).to(tl.int64) * blocks * 3
    last = -1
    before = 0
    for start in range(0, blocks, STEP):
        block = start + tl.arange(0, STEP)
        exists = block < blocks
        count = tl.load(line + block * 3 + 2, mask=exists, other=0)
        last = _join_preceding(line, block, exists, last)
        tl.store(line + block * 3 + 2, tl.cumsum(count, 0) - count + before, mask=exists)
        before += tl.sum(count, 0)
    _join_following(line, kv_len, blocks, STEP)


@triton.jit
def _up_to(key, near, line, BLOCK: tl.constexpr):
    """How many valid keys there are up to a key, it among them."""
    return tl.load(near + key * 3 + 2) + tl.load(line + key // BLOCK * 3 + 2)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0)


@triton.jit(
    do_not_specialize=[
        *("row_step", "row_count", "q_len", "kv_len", "parts", "blocks", "row_blocks"),
        "batches",
    ]
)
def _read_facts(
    rows,
    of_parts,
    widths,
    valid,
    near,
    found,
    facts,
    lasts,
    firsts,
    sees,
    valid_if_causal,
    valid_in_window,
    row_step,
    row_count,
    q_len,
    kv_len,
    parts,
    blocks,
    row_blocks,
    batches,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
):
    """What does not hold for some rows, or for a block of keys, and tables of them."""
    place, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offset = _highest(of_parts, 3, batches * parts, -kv_len, STEP)
    width = _highest(widths, 1, batches * parts, 1, STEP)
    fact = facts + (batch * (row_blocks + blocks) + place) * 16
    tl.store(fact, offset)
    tl.store(fact + 1, width)
    tl.store(fact + 2, _highest(of_parts + 2, 3, batches * parts, 0, STEP))
    if place < row_blocks:
        row = place * ROWS + tl.arange(0, ROWS)
        exists = row < q_len
        source = rows + (batch * row_count + row * row_step) * 3
        first = tl.load(source, mask=exists, other=0)
        last = tl.load(source + 1, mask=exists, other=-1)
        count = tl.load(source + 2, mask=exists, other=0)
        sees_some = count > 0
        sees_none = exists & (count == 0)
        near += batch * blocks * KEYS * 3
        line = found + batch * blocks * 3
        lowest, highest = tl.load(line), tl.load(line + (blocks - 1) * 3 + 1)
        begin = tl.where(sees_some, first, 0)
        end = tl.where(sees_some, last, 0)
        between = _up_to(end, near, line, KEYS) - _up_to(begin, near, line, KEYS) + 1
        own = row + offset
        inside = tl.minimum(tl.maximum(own, 0), kv_len - 1)
        up_to_own = tl.where(own < 0, -1, _preceding(inside, near, line, KEYS, 3))
        inside = tl.minimum(tl.maximum(own - width + 1, 0), kv_len - 1)
        window = _following(inside, near, line, kv_len, blocks, KEYS, 3)
        tl.store(fact + 3, _any(sees_some & (between != count)))
        tl.store(fact + 4, _any(sees_some))
        tl.store(fact + 5, _any(sees_some & (up_to_own != last)))
        tl.store(fact + 6, _any(sees_some & (last != highest)))
        tl.store(fact + 7, _any(sees_some & (first != lowest)))
        tl.store(fact + 8, _any(sees_some & (window != first)))
        tl.store(fact + 9, 0)
        tl.store(fact + 10, 0)
        tl.store(fact + 11, 0)
        tl.store(fact + 12, _any(sees_none & (lowest <= highest)))
        tl.store(fact + 13, _any(sees_none & (lowest <= up_to_own)))
        tl.store(fact + 14, _any(sees_none & (window <= up_to_own)))
        line = batch * q_len + row
        tl.store(lasts + line, tl.where(sees_some, last, -1).to(tl.int64), mask=exists)
        tl.store(firsts + line, tl.where(sees_some, first, kv_len).to(tl.int64), mask=exists)
        tl.store(sees + line, sees_some.to(tl.uint8), mask=exists)
    else:
        key = (place - row_blocks) * KEYS + tl.arange(0, KEYS)
        is_key = key < kv_len
        of_key = batch * kv_len + key
        shown = tl.load(valid + of_key, mask=is_key, other=1) > 0
        # A key that no row of a causal call reaches need not be hidden from them.
        causal = shown | (key > q_len - 1 + offset)
        # Nor one before the window of the first row.
        windowed = causal | (key <= offset - width)
        tl.store(valid_if_causal + of_key, causal.to(tl.uint8), mask=is_key)
        tl.store(valid_in_window + of_key, windowed.to(tl.uint8), mask=is_key)
        for column in tl.static_range(3, 9):
            tl.store(fact + column, 0)
        for column in tl.static_range(12, 15):
            tl.store(fact + column, 0)
        tl.store(fact + 9, _any(is_key & (shown == 0)))
        tl.store(fact + 10, _any(is_key & (causal == 0)))
        tl.store(fact + 11, _any(is_key & (windowed == 0)))
    tl.store(fact + 15, 0)


_launch_rows = Launch(_read_rows)
_launch_keys = Launch(_read_keys)
_launch_join = Launch(_join_keys)
_launch_facts = Launch(_read_facts)


def read(mask: Tensor, q_len: int) -> list[Tensor]:
    """What the rows of a mask see, and what is true of them.

    Args:
        mask: [Bm, Sq or 1, Skv]: bool, float16, bfloat16 or float32, on the GPU.
        q_len: Rows Sq; one row of a mask stands for all.

    Returns:
        int32 [Bm, parts, 16], facts of parts of rows and keys, of which the highest numbers
        count: of truths in `SOME` whether they hold, of others whether they do not. Then, of
        `masks.MaskFacts`: last, first, sees, valid, valid_if_causal and valid_in_window.
    """
    batch, row_count, kv_len = mask.shape
    parts, row_blocks = -(-row_count // ROWS), -(-q_len // ROWS)
    blocks = -(-kv_len // KEYS)
    added = mask.dtype is not torch.bool
    entries = mask if added else mask.view(torch.uint8)
    step = power_of_two(min(STEP, batch * parts))

    def made(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return empty(entries, (batch, *shape), dtype)

    rows, seen = made(row_count, ROW_NUMBERS), made(parts, kv_len, dtype=torch.uint8)
    of_parts, widths = made(parts, PART_NUMBERS), made(parts)
    near, found = made(blocks * KEYS, KEY_NUMBERS), made(blocks, 3)
    facts = made(row_blocks + blocks, COLUMNS)
    lasts, firsts = (made(q_len, dtype=torch.int64) for _ in range(2))
    sees = made(q_len, dtype=torch.bool)
    valids = [made(kv_len, dtype=torch.bool) for _ in range(3)]
    valid, *others = (tensor.view(torch.uint8) for tensor in valids)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    _launch_rows(
        (parts, batch, 1),
        entries,
        rows,
        seen,
        of_parts,
        *entries.stride(),
        row_count,
        kv_len,
        parts,
        torch.finfo(mask.dtype).min if added else 0.0,
        ROWS=ROWS,
        WIDTH=WIDTH,
        ADDED=added,
        num_warps=8,
        enable_fp_fusion=True,
    )
    _launch_keys(
        (blocks + parts, batch, 1),
        seen,
        rows,
        of_parts,
        valid,
        near,
        found,
        widths,
        row_count,
        kv_len,
        parts,
        blocks,
        batch,
        ROWS=ROWS,
        KEYS=KEYS,
        PARTS=PARTS,
        STEP=step,
        **options,
    )
    _launch_join(
        (batch, 1, 1), found, kv_len, blocks, STEP=power_of_two(min(STEP, blocks)), **options
    )
    _launch_facts(
        (row_blocks + blocks, batch, 1),
        rows,
        of_parts,
        widths,
        valid,
        near,
        found,
        facts,
        lasts,
        firsts,
        sees.view(torch.uint8),
        *others,
        0 if row_count == 1 else 1,
        row_count,
        q_len,
        kv_len,
        parts,
        blocks,
        row_blocks,
        batch,
        ROWS=ROWS,
        KEYS=KEYS,
        STEP=step,
        **options,
    )
    return [facts, lasts, firsts, sees, *valids]
