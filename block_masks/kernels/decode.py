"""The units that decoding queries read: estimated from summaries, chosen, and named.

Symbols: B requests, Hq/Hkv heads, P keys of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_rule import DecodeRule
from .gpu import early_options, register_options, starts_early
from .launch import Launch
from .pages import _summarize_key
from .recording import empty
from .scratch import power_of_two

# Units that a warp estimates at a time, warps of a program that only does that, and warps for all
# sequences together at least.
ROWS_OF_WARP, ESTIMATING, WARPS_AT_WORK = 16, 4, 2048
# Warps of a program that estimates and chooses, registers of their threads, and programs of so many
# warps at most: what GPUs of 132 multiprocessors hold at once.
TOGETHER, REGISTERS, AT_ONCE = 8, 128, 264
# Keys of a page that a warp reads at a time.
PAGE_ROWS_OF_WARP = 8
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
def _estimate(
    rows,
    stride_head,
    table,
    numbers,
    scales,
    out,
    first,
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
    """Logarithms of the masses of units, for the query heads of one key head.

    Of ROWS units from ``first`` on, and again every ``step`` units; none from ``stop`` on.
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
    for start in range(first, stop, step):
        place = start + tl.arange(0, ROWS)
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
        "stride_token",
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
def _decode(
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
    arrivals,
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
    top_p,
    share,
    budget,
    fewest,
    whole,
    sinks,
    last,
    scale,
    ESTIMATES: tl.constexpr,
    CHOOSES: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    ABOVE: tl.constexpr,
    LEAST: tl.constexpr,
    SIZES: tl.constexpr,
    EARLY: tl.constexpr,
    FOLLOWED: tl.constexpr,
):
    """Programs of one request and key head: they estimate units, and the last to arrive chooses.

    With ESTIMATES alone nothing is chosen, and with CHOOSES alone the choice is one program's, of
    units that were estimated. With PACK the query is copied besides, rows and heads side by side,
    with GROUP what summaries say of the request's last key is brought up to date first.

    A request takes the least of SIZES sizes, each twice the one before, that holds its units, if
    these are more than ABOVE: in an engine for long requests short ones take no longer than in one
    for short ones. With EARLY it may start before the kernel that it comes after is done, and if
    it is FOLLOWED by another of this kind, that one before this is.
    """
    if EARLY:
        # What comes after the last of these kernels takes those before it for done. All programs
        # wait, for what wrote the lengths may not be done.
        if FOLLOWED:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(1)
    request = sequence // kv_heads
    head = sequence % kv_heads
    program = tl.program_id(0)
    length = tl.load(lengths + request)
    count = tl.cdiv(length, UNIT)
    table = tables + request.to(tl.int64) * table_stride
    # A request that keeps everything is not scored. Where summaries are behind the last unit has a
    # program of its own, the last one, which others need not wait for.
    apart: tl.constexpr = 1 if GROUP > 0 else 0
    tiles = tl.num_programs(0) - apart
    chooses = program == 0
    if ESTIMATES:
        chooses &= count <= whole
        rows = query + request.to(tl.int64) * stride_token
        if PACK and program == 0:
            row = tl.arange(0, PADDED)[:, None]
            at = tl.arange(0, WIDTH)[None, :]
            inside = (row < HEADS) & (at < head_dim)
            held = tl.load(rows + (head * HEADS + row) * stride_head + at, mask=inside)
            out = packed + (sequence * HEADS + row).to(tl.int64) * head_dim
            tl.store(out + at, held, mask=inside)
        if GROUP > 0 and (length > 0) & (program == tiles):
            page: tl.constexpr = UNITS * UNIT
            slot = tl.load(table + (length - 1) // page) * page + (length - 1) % page
            _summarize_key(
                slot, slot >= 0, head, keys, means, numbers, scales, pinned,
                stride_page, stride_key_head, stride_key, kv_heads, head_dim,
                page, GROUP, UNIT, PAGE_ROWS, WIDTH,
            )  # fmt: skip
            tl.debug_barrier()
        first = tl.where(program < tiles, program * ROWS, count - 1)
        stop = tl.where(program < tiles, count - apart, count)
        if (count > whole) & (first < stop):
            _estimate(
                rows, stride_head, table, numbers, scales,
                masses + (sequence * HEADS).to(tl.int64) * width,
                first, stop, tiles * ROWS, length, head, width, kv_heads, head_dim, scale,
                UNITS, UNIT, HEADS, PADDED, TYPE, ROWS, WIDTH,
            )  # fmt: skip
            if CHOOSES:
                # What all threads wrote is there before this program counts as arrived.
                tl.debug_barrier()
                before = tl.atomic_add(arrivals + sequence, 1, sem="acq_rel")
                chooses = before == tl.minimum(tl.cdiv(count - apart, ROWS), tiles) + apart - 1
                if chooses:
                    tl.store(arrivals + sequence, 0)
    if CHOOSES:
        for i in tl.static_range(SIZES):
            holds = (count > ((LEAST << i) // 2 if i > 0 else ABOVE)) & (count <= (LEAST << i))
            if chooses & holds:
                total = _choose_of(
                    masses, pinned, table, out_tables + sequence.to(tl.int64) * out_width,
                    sequence, count, width, kv_heads, page_step, head_step, unit_step,
                    top_p, share, budget, fewest, whole, sinks, last,
                    UNITS, HEADS,
                    PADDED if PADDED * (LEAST << i) <= HELD else max(HELD // (LEAST << i), 1),
                    TOP_P, BITS, LEAST << i,
                )  # fmt: skip
                tl.store(out_lengths + sequence, total * UNIT - (count * UNIT - length))
                tl.atomic_add(counter, total.to(tl.int64))
                tl.atomic_add(counter + 1, count.to(tl.int64))


_launch = Launch(_decode)


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
    arrivals: Tensor | None = None,
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
        arrivals: int32 [B * Hkv or more], zeros before and after, so that one launch does for all
            but very many long requests; ``None`` for launches of their own.
        written: Keys [all pages, Hkv, P, D], numbers of a key side by side, and means
            [all pages, Hkv, R, D], contiguous: what summaries say of every request's last key is
            brought up to date first. ``None`` where they are.
    """
    batch, q_heads, head_dim = query.shape
    kv_heads, units = numbers.shape[1:3]
    heads, width, page = q_heads // kv_heads, tables.shape[1] * units, units * unit
    sequences = batch * kv_heads
    masses = empty(query, (sequences * heads * width,), torch.float32)
    keys, means = (query, query) if written is None else written
    key_strides = (0, 0, 0) if written is None else keys.stride()[:3]
    early = starts_early(query.device)

    groups = 0 if written is None else page // means.shape[2]

    def programs_of(warps: int) -> int:
        tiles = -(-width // (ROWS_OF_WARP * warps))
        return min(tiles, -(-WARPS_AT_WORK // (sequences * warps))) + (groups > 0)

    def launch(
        warps: int, above: int, largest: int, *, estimates: bool, chooses: bool, followed: bool
    ) -> None:
        programs = programs_of(warps) if estimates else 1
        least = min(SMALL, largest) if above < 0 else 2 * above
        _launch(
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
            lengths if arrivals is None else arrivals,
            out_tables,
            out_lengths,
            counter,
            query.stride(0),
            query.stride(1),
            *key_strides,
            tables.stride(0),
            width,
            out_tables.stride(0),
            kv_heads,
            head_dim,
            *steps,
            rule.top_p,
            rule.share,
            rule.budget,
            rule.fewest,
            rule.read_whole,
            rule.sinks,
            rule.last,
            scale,
            ESTIMATES=estimates,
            CHOOSES=chooses,
            PACK=packed is not None and estimates,
            GROUP=groups if estimates else 0,
            PAGE_ROWS=min(page, PAGE_ROWS_OF_WARP * warps),
            UNITS=units,
            UNIT=unit,
            HEADS=heads,
            PADDED=power_of_two(heads),
            TYPE=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
            ROWS=ROWS_OF_WARP * warps,
            WIDTH=power_of_two(head_dim),
            HELD=HELD * 32 * warps,
            TOP_P=rule.top_p < 1.0,
            BITS=KEY_BITS,
            ABOVE=above,
            LEAST=least,
            SIZES=(largest // least).bit_length(),
            EARLY=early,
            FOLLOWED=followed,
            num_warps=warps,
            enable_fp_fusion=True,
            **early_options(early),
            **(register_options(query.device, REGISTERS) if estimates and chooses else {}),
        )

    size = power_of_two(width)
    # Of many sequences those of few units have a launch of their own.
    is_one = sequences <= FEW or size <= MIDDLE
    parts = [(-1, size)] if is_one else [(-1, MIDDLE), (MIDDLE, size)]
    warps = max(ESTIMATING, min(TOGETHER, _choosing(parts[0][1])))
    # Programs of many warps wait for one another where they are many.
    is_fast = warps == ESTIMATING or sequences * programs_of(warps) <= AT_ONCE
    if arrivals is not None and is_fast and size < VERY_MANY:
        launch(warps, *parts[0], estimates=True, chooses=True, followed=len(parts) > 1)
        del parts[0]
    else:
        launch(ESTIMATING, -1, size, estimates=True, chooses=False, followed=True)
    for part in parts:
        followed = part[1] < size
        launch(_choosing(part[1]), *part, estimates=False, chooses=True, followed=followed)


def _choosing(units: int) -> int:
    """Warps of a choice among so many units."""
    most = WARPS if units < VERY_MANY else 2 * WARPS
    return min(most, max(1, units // OF_WARP))
