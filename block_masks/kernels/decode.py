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
from .pages import FEW_ROWS, _average_page, _summarize_last
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


@triton.jit
def _mass(logit, variance, size):
    """Logarithm of the mass of keys whose mean logit and variance these are; size is log(keys)."""
    frozen = tl.sqrt(2 * variance * size) - size
    return logit + size + tl.where(variance < 2 * size, variance / 2, frozen)


@triton.jit
def _estimate_units(
    rows,
    stride_head,
    table,
    numbers,
    scales,
    out,
    stop,
    step,
    length,
    head,
    width,
    kv_heads,
    head_dim,
    scale,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Masses of ROWS units that are this program's, again every ``step`` units; none of ``stop``'s.

    Logarithms, for the query heads of one key head.
    """
    column = tl.arange(0, WIDTH)
    # Products are of 16 columns at least.
    own_head = tl.arange(0, PADDED if PADDED > 16 else 16)
    own_rows = rows + (head * HEADS + own_head) * stride_head
    held_row = (own_head < HEADS)[None, :] & (column < head_dim)[:, None]
    own = tl.load(own_rows[None, :] + column[:, None], mask=held_row, other=0.0)
    own = own.to(tl.float32) * scale
    square = (own * own).to(TYPE)
    own = own.to(TYPE)
    out += own_head.to(tl.int64)[None, :] * width
    for first in range(tl.program_id(0) * ROWS, stop, step):
        place = first + tl.arange(0, ROWS)
        exists = place < stop
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
        is_stored = exists[:, None] & (own_head < HEADS)[None, :]
        tl.store(out + place[:, None], _mass(logit, variance, size), mask=is_stored)


@triton.jit
def _follow_key(
    rows,
    stride_head,
    table,
    keys,
    means,
    numbers,
    scales,
    pinned,
    out,
    estimates,
    length,
    head,
    width,
    stride_page,
    stride_key_head,
    stride_key,
    kv_heads,
    head_dim,
    scale,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Brings summaries up to date with a request's last key; the mass of its unit where wanted."""
    page_size: tl.constexpr = UNITS * UNIT
    place = (length - 1) % page_size
    page = tl.load(table + (length - 1) // page_size).to(tl.int64)
    base = keys + page * stride_page + head.to(tl.int64) * stride_key_head
    if place == page_size - 1:
        _average_page(
            base, means, page, head, stride_key, kv_heads, head_dim, page_size, GROUP, ROWS, WIDTH
        )
    parts, factor = _summarize_last(
        base, place, page, head, numbers, scales, pinned, stride_key, kv_heads, head_dim,
        page_size, UNIT, WIDTH,
    )  # fmt: skip
    if estimates:
        # As `_estimate_units`, without reading what was written just now.
        column = tl.arange(0, WIDTH)
        row = tl.arange(0, PADDED)
        at = rows + (head * HEADS + row)[:, None] * stride_head + column[None, :]
        inside = (row < HEADS)[:, None] & (column < head_dim)[None, :]
        own = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
        square = (own * own).to(TYPE).to(tl.float32)
        own = own.to(TYPE).to(tl.float32)
        mean, spread = tl.split(parts)
        of_mean, of_spread = tl.split(factor)
        spread = (spread * spread).to(TYPE).to(tl.float32)
        logit = tl.sum(own * mean[None, :], 1) * of_mean
        variance = tl.sum(square * spread[None, :], 1) * (of_spread * of_spread)
        mass = _mass(logit, variance, tl.log((place % UNIT + 1).to(tl.float32)))
        tl.store(out + row.to(tl.int64) * width, mass, mask=row < HEADS)


@triton.jit(do_not_specialize=["width", "out_width", "whole", "table_stride", "stride_token"])
def _estimate(
    query,
    packed,
    keys,
    means,
    numbers,
    scales,
    pinned,
    tables,
    lengths,
    masses,
    out_tables,
    out_lengths,
    counter,
    stride_token,
    stride_head,
    stride_page,
    stride_key_head,
    stride_key,
    table_stride,
    width,
    out_width,
    kv_heads,
    head_dim,
    page_step,
    head_step,
    unit_step,
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
    GROUP: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Masses of the units of one request, for the query heads of one key head.

    The units of a request of no more than ``whole`` are named instead: it keeps them all. With PACK
    the query is copied besides, rows and heads side by side. With GROUP what summaries say of the
    request's last key is brought up to date, by a program that sees to the last unit alone. With
    EARLY it may start before the kernel that it comes after is done, and the one behind it before
    it is.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    request = sequence // kv_heads
    head = sequence % kv_heads
    length = tl.load(lengths + request)
    units = tl.cdiv(length, UNIT)
    table = tables + request.to(tl.int64) * table_stride
    rows = query + request.to(tl.int64) * stride_token
    out = masses + (sequence * HEADS).to(tl.int64) * width
    if PACK and program == 0:
        row = tl.arange(0, PADDED)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (row < HEADS) & (column < head_dim)
        at = rows + (head * HEADS + row) * stride_head + column
        copied = packed + (sequence * HEADS + row).to(tl.int64) * head_dim + column
        tl.store(copied, tl.load(at, mask=inside), mask=inside)
    apart: tl.constexpr = 1 if GROUP > 0 else 0
    tiles = tl.num_programs(0) - apart
    if GROUP > 0 and program == tiles:
        if length > 0:
            _follow_key(
                rows, stride_head, table, keys, means, numbers, scales, pinned, out + units - 1,
                units > whole, length, head, width, stride_page, stride_key_head, stride_key,
                kv_heads, head_dim, scale,
                UNITS, UNIT, HEADS, PADDED, TYPE, GROUP, PAGE_ROWS, WIDTH,
            )  # fmt: skip
    elif units > whole:
        _estimate_units(
            rows, stride_head, table, numbers, scales, out, units - apart, tiles * ROWS, length,
            head, width, kv_heads, head_dim, scale,
            UNITS, UNIT, HEADS, PADDED, TYPE, ROWS, WIDTH,
        )  # fmt: skip
    else:
        for first in range(program * ROWS, units, tiles * ROWS):
            place = first + tl.arange(0, ROWS)
            exists = place < units
            number = tl.load(table + place // UNITS, mask=exists, other=0) * page_step
            number += head * head_step + place % UNITS * unit_step
            tl.store(out_tables + sequence.to(tl.int64) * out_width + place, number, mask=exists)
        if program == 0:
            tl.store(out_lengths + sequence, length)
            tl.atomic_add(counter, units.to(tl.int64))
            tl.atomic_add(counter + 1, units.to(tl.int64))


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

    Not those of a request of no more than ``whole``, which `_estimate` names.

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
        holds = (count > ((LEAST << i) // 2 if i > 0 else ABOVE)) & (count <= (LEAST << i))
        if holds & (count > whole):
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
    written: tuple[Tensor, Tensor] | None = None,
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
        written: Keys [all pages, Hkv, P, D], numbers of a key side by side, and means
            [all pages, Hkv, R, D], contiguous: what summaries say of every request's last key is
            brought up to date first. ``None`` where it is.
    """
    batch, q_heads, head_dim = query.shape
    kv_heads, units = numbers.shape[1:3]
    heads, width, page = q_heads // kv_heads, tables.shape[1] * units, units * unit
    sequences = batch * kv_heads
    masses = empty(query, (sequences * heads * width,), torch.float32)
    keys, means = (query, query) if written is None else written
    programs = min(-(-width // ROWS), -(-PROGRAMS // sequences)) + (written is not None)
    early = starts_early(query.device)
    _launch_estimate(
        (programs, sequences, 1),
        query,
        query if packed is None else packed,
        keys,
        means,
        numbers,
        scales,
        pinned,
        tables,
        lengths,
        masses,
        out_tables,
        out_lengths,
        counter,
        query.stride(0),
        query.stride(1),
        *((0, 0, 0) if written is None else keys.stride()[:3]),
        tables.stride(0),
        width,
        out_tables.stride(0),
        kv_heads,
        head_dim,
        *steps,
        rule.read_whole,
        scale,
        UNITS=units,
        UNIT=unit,
        HEADS=heads,
        PADDED=power_of_two(heads),
        TYPE=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
        ROWS=ROWS,
        WIDTH=power_of_two(head_dim),
        PACK=packed is not None,
        GROUP=0 if written is None else page // means.shape[2],
        PAGE_ROWS=min(page, FEW_ROWS),
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
