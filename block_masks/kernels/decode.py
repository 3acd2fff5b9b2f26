"""The units that decoding queries read: estimated from summaries, chosen, and named.

Symbols: B requests, Hq/Hkv heads, P keys of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_rule import DecodeRule
from .gpu import early_options, starts_early
from .launch import Launch
from .recording import empty
from .scratch import power_of_two

# Units that one program scores at a time, and programs for all sequences together at least.
ROWS, PROGRAMS = 64, 512
# Units of a sequence that a warp of the choice holds, and how many warps there are at most: for
# very many units twice as many.
OF_WARP, WARPS, VERY_MANY = 256, 16, 16384
# Sequences that are few: each has a multiprocessor to itself.
FEW = 132
# Numbers of masses that a thread of the choice holds at once.
HELD = 64
# Sizes of a choice begin here, and those of many sequences have a launch of their own up to here,
# for what larger ones hold in registers leaves room for few programs.
SMALL, MIDDLE = 512, 1024
# Shares are ranked by so many bits: 5 of their exponents, for below 2^-31 they are alike, and 7 of
# their mantissas.
KEY_BITS = 12


@triton.jit(do_not_specialize=["width", "whole", "table_stride"])
def _estimate(
    query,
    numbers,
    scales,
    tables,
    lengths,
    masses,
    packed,
    stride_row,
    stride_head,
    table_stride,
    width,
    kv_heads,
    head_dim,
    whole,
    scale,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Logarithms of the masses of units, ROWS at a time, for the query heads of one key head.

    With PACK the query is copied besides, rows and heads side by side. With EARLY it may start
    before the kernel that it comes after is done, and the one behind it before it is.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    length = tl.load(lengths + request)
    if PACK and tl.program_id(0) == 0:
        row = tl.arange(0, PADDED)[:, None]
        at = tl.arange(0, WIDTH)[None, :]
        inside = (row < HEADS) & (at < head_dim)
        rows = query + request.to(tl.int64) * stride_row + (head * HEADS + row) * stride_head
        out = packed + (tl.program_id(1) * HEADS + row).to(tl.int64) * head_dim
        tl.store(out + at, tl.load(rows + at, mask=inside), mask=inside)
    # A request that keeps everything is not scored.
    if tl.cdiv(length, UNIT) > whole:
        table = tables + request.to(tl.int64) * table_stride
        column = tl.arange(0, WIDTH)
        own_head = tl.arange(0, PADDED)
        rows = query + request.to(tl.int64) * stride_row + (head * HEADS + own_head) * stride_head
        held_row = (own_head < HEADS)[None, :] & (column < head_dim)[:, None]
        own = tl.load(rows[None, :] + column[:, None], mask=held_row, other=0.0)
        own = own.to(tl.float32) * scale
        square = (own * own).to(TYPE)
        own = own.to(TYPE)
        out = masses + (tl.program_id(1) * HEADS + own_head).to(tl.int64)[None, :] * width
        units = tl.cdiv(length, UNIT)
        for first in range(tl.program_id(0) * ROWS, units, tl.num_programs(0) * ROWS):
            place = first + tl.arange(0, ROWS)
            exists = place < units
            page = tl.load(table + place // UNITS, mask=exists, other=0).to(tl.int64)
            line = ((page * kv_heads + head) * UNITS + place % UNITS) * 2
            inside = exists[:, None] & (column < head_dim)[None, :]
            at = numbers + line[:, None] * head_dim + column[None, :]
            mean = tl.load(at, mask=inside, other=0).to(tl.float32).to(TYPE)
            spread = tl.load(at + head_dim, mask=inside, other=0).to(tl.float32)
            of_mean = tl.load(scales + line, mask=exists, other=0.0).to(tl.float32)
            of_spread = tl.load(scales + line + 1, mask=exists, other=0.0).to(tl.float32)
            held = tl.minimum(length - place * UNIT, UNIT)
            size = tl.log(tl.maximum(held, 1).to(tl.float32))[:, None]
            logit = tl.dot(mean, own, input_precision="ieee") * of_mean[:, None]
            variance = tl.dot((spread * spread).to(TYPE), square, input_precision="ieee")
            variance *= (of_spread * of_spread)[:, None]
            frozen = tl.sqrt(2 * variance * size) - size
            mass = logit + size + tl.where(variance < 2 * size, variance / 2, frozen)
            tl.store(out + place[:, None], mass, mask=exists[:, None] & (own_head < HEADS)[None, :])


@triton.jit
def _largest(keys, weights, least, BITS: tl.constexpr):
    """The largest key of BITS bits at which those that are no smaller still weigh ``least``."""
    found = tl.zeros([], dtype=tl.int32)
    for i in range(BITS):
        tried = found | (1 << (BITS - 1 - i))
        weighs = tl.sum(tl.where(keys >= tried, weights, tl.zeros_like(weights)), 0)
        found = tl.where(weighs >= least, tried, found)
    return found


@triton.jit
def _choose_of(
    masses,
    pinned,
    table,
    out,
    sequence,
    count,
    width,
    kv_heads,
    page_step,
    head_step,
    unit_step,
    top_p,
    share,
    budget,
    fewest,
    whole,
    sinks,
    last,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Names the units of one sequence that are kept, of at most SIZE; how many these are."""
    place = tl.arange(0, SIZE)
    exists = place < count
    # Read long before it is wanted.
    page = tl.load(table + place // UNITS, mask=exists, other=0)
    head = sequence % kv_heads
    number = page * page_step
    number += head * head_step + place % UNITS * unit_step
    kept = exists
    at = place
    total = count
    if count > whole:
        unit = (page.to(tl.int64) * kv_heads + head) * UNITS + place % UNITS
        stays = tl.load(pinned + unit, mask=exists, other=0) > 0
        shares = tl.zeros([SIZE], dtype=tl.float32)
        unknown = tl.zeros([SIZE], dtype=tl.int32)
        for i in tl.static_range(0, HEADS, TOGETHER):
            row = i + tl.arange(0, TOGETHER)
            line = (sequence * HEADS + row).to(tl.int64) * width
            read = (row < HEADS)[:, None] & exists[None, :]
            mass = tl.load(masses + line[:, None] + place[None, :], mask=read, other=float("-inf"))
            unknown += tl.sum((mass != mass).to(tl.int32), 0)
            mass = tl.where(mass != mass, float("-inf"), mass)
            most = tl.max(mass, 1)
            mass = tl.exp(mass - tl.where(most == float("-inf"), 0.0, most)[:, None])
            shares += tl.sum(mass / tl.maximum(tl.sum(mass, 1), 1e-30)[:, None], 0)
        shares = shares / HEADS
        forced = (place < sinks) | (place >= count - last) | (unknown > 0) | stays
        forced = exists & forced
        # Numbers from 0 on are ordered as their bits.
        keys = (shares.to(tl.int32, bitcast=True) >> 16) - (96 << 7)
        keys = tl.minimum(tl.maximum(keys, 0), (1 << BITS) - 1)
        keys = tl.where(exists & (forced == 0), keys, -1)
        always = tl.sum(forced.to(tl.int32), 0)
        limit = count
        if budget >= 0:
            limit = tl.minimum(limit, budget)
        limit = tl.minimum(limit, tl.ceil(count * share).to(tl.int32))
        wanted = count
        if TOP_P:
            needed = top_p * tl.sum(shares, 0) - tl.sum(tl.where(forced, shares, 0.0), 0)
            least = _largest(keys, shares, needed, BITS)
            needed -= tl.sum(tl.where(keys > least, shares, 0.0), 0)
            same = tl.where(keys == least, shares, 0.0)
            taken = (keys > least) | ((keys == least) & (tl.cumsum(same, 0) - same < needed))
            wanted = always + tl.where(needed > 0, tl.sum(taken.to(tl.int32), 0), 0)
        wanted = tl.maximum(tl.minimum(wanted, limit), fewest)
        total = tl.maximum(wanted, always)
        # Integers are added up by one instruction.
        ones = tl.full([SIZE], 1, dtype=tl.int32)
        least = _largest(keys, ones, total - always, BITS)
        more = keys > least
        left = total - always - tl.sum(more.to(tl.int32), 0)
        # Of those that are alike the first ones. One sum counts them and the others.
        more = more | forced
        same = keys == least
        wide: tl.constexpr = tl.int64 if SIZE > 16384 else tl.int32
        both = tl.cumsum(more.to(wide) + same.to(wide) * 65536, 0)
        alike = (both >> 16).to(tl.int32)
        kept = more | (same & (alike <= left))
        at = (both & 65535).to(tl.int32) + tl.minimum(alike, left) - 1
    tl.store(out + at, number, mask=kept)
    return total


@triton.jit(
    do_not_specialize=[
        "width",
        "out_width",
        "table_stride",
        "budget",
        "fewest",
        "whole",
        "sinks",
        "last",
    ]
)
def _choose(
    masses,
    pinned,
    tables,
    lengths,
    out_tables,
    out_lengths,
    counter,
    table_stride,
    width,
    out_width,
    kv_heads,
    page_step,
    head_step,
    unit_step,
    top_p,
    share,
    budget,
    fewest,
    whole,
    sinks,
    last,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    HELD: tl.constexpr,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    ABOVE: tl.constexpr,
    LEAST: tl.constexpr,
    SIZES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Chooses and names the units of one request and key head, if these are more than ABOVE.

    A request takes the least of SIZES sizes, each twice the one before, that holds its units: in an
    engine for long requests short ones take no longer than in one for short ones.
    """
    if EARLY:
        # All programs: what comes after this kernel takes the one before it for done. First of all:
        # what wrote the lengths may not be done either.
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0)
    request = sequence // kv_heads
    length = tl.load(lengths + request)
    count = tl.cdiv(length, UNIT)
    for i in tl.static_range(SIZES):
        if (count > ((LEAST << i) // 2 if i > 0 else ABOVE)) & (count <= (LEAST << i)):
            total = _choose_of(
                masses,
                pinned,
                tables + request.to(tl.int64) * table_stride,
                out_tables + sequence.to(tl.int64) * out_width,
                sequence,
                count,
                width,
                kv_heads,
                page_step,
                head_step,
                unit_step,
                top_p,
                share,
                budget,
                fewest,
                whole,
                sinks,
                last,
                UNITS,
                HEADS,
                PADDED if PADDED * (LEAST << i) <= HELD else max(HELD // (LEAST << i), 1),
                TOP_P,
                BITS,
                LEAST << i,
            )
            tl.store(out_lengths + sequence, total * UNIT - (count * UNIT - length))
            tl.atomic_add(counter, total.to(tl.int64))
            tl.atomic_add(counter + 1, count.to(tl.int64))


_launch_estimate = Launch(_estimate)
_launch_choose = Launch(_choose)


def choose_units(
    query: Tensor,
    numbers: Tensor,
    scales: Tensor,
    pinned: Tensor,
    tables: Tensor,
    lengths: Tensor,
    out_tables: Tensor,
    out_lengths: Tensor,
    counter: Tensor,
    *,
    unit: int,
    rule: DecodeRule,
    scale: float,
    steps: tuple[int, int, int],
    packed: Tensor | None = None,
) -> None:
    """`pages.choose_units` on the GPU.

    Args:
        query: [B, Hq, D], numbers of a row side by side.
        numbers: int8 [all pages, Hkv, P / U, 2, D], contiguous.
        scales: [all pages, Hkv, P / U, 2], contiguous.
        pinned: uint8 [all pages, Hkv, P / U], contiguous; units other than 0 stay.
        tables: int32 [B, n], numbers of a row side by side.
        lengths: int32 [B].
        out_tables: int32 [B * Hkv or more, n * P / U or more].
        out_lengths: int32 [B * Hkv or more].
        counter: int64 [2], to which kept and visible units are added.
        unit: U, a power of two.
        rule: Which units are kept.
        scale: Factor on the logits.
        steps: What a page, a key head, and a unit of a page, adds to the number of a unit.
        packed: [B, Hq, D], contiguous, where the query is copied to; ``None`` for nowhere.
    """
    batch, q_heads, head_dim = query.shape
    kv_heads, units = numbers.shape[1:3]
    heads, width = q_heads // kv_heads, tables.shape[1] * units
    sequences = batch * kv_heads
    masses = empty(query, (sequences * heads * width,), torch.float32)
    programs = min(-(-width // ROWS), -(-PROGRAMS // sequences))
    early = starts_early(query.device)
    _launch_estimate(
        (programs, sequences, 1),
        query,
        numbers,
        scales,
        tables,
        lengths,
        masses,
        query if packed is None else packed,
        query.stride(0),
        query.stride(1),
        tables.stride(0),
        width,
        kv_heads,
        head_dim,
        rule.read_whole,
        scale,
        UNITS=units,
        UNIT=unit,
        HEADS=heads,
        PADDED=max(16, power_of_two(heads)),
        TYPE=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
        ROWS=ROWS,
        WIDTH=power_of_two(head_dim),
        PACK=packed is not None,
        EARLY=early,
        num_warps=4,
        enable_fp_fusion=True,
        **early_options(early),
    )
    size = power_of_two(width)
    together = sequences <= FEW or size <= MIDDLE
    for above, largest in [(-1, size)] if together else [(-1, MIDDLE), (MIDDLE, size)]:
        least = min(SMALL, size) if above < 0 else 2 * above
        warps = min(WARPS if size < VERY_MANY else 2 * WARPS, max(1, largest // OF_WARP))
        _launch_choose(
            (sequences, 1, 1),
            masses,
            pinned,
            tables,
            lengths,
            out_tables,
            out_lengths,
            counter,
            tables.stride(0),
            width,
            out_tables.stride(0),
            kv_heads,
            *steps,
            rule.top_p,
            rule.share,
            rule.budget,
            rule.fewest,
            rule.read_whole,
            rule.sinks,
            rule.last,
            UNITS=units,
            UNIT=unit,
            HEADS=heads,
            PADDED=power_of_two(heads),
            HELD=HELD * 32 * warps,
            TOP_P=rule.top_p < 1.0,
            BITS=KEY_BITS,
            ABOVE=above,
            LEAST=least,
            SIZES=(largest // least).bit_length(),
            EARLY=early,
            num_warps=warps,
            enable_fp_fusion=True,
            **early_options(early),
        )
