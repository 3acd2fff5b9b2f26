"""Block lists on the GPU: normalise, combine, choose, guard and compact, a query block a program.

Symbols: R rows of a query block and head, Nq/Nk query and key blocks, P = Nk as a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_lists import BlockLists
from ..geometry import BlockGeometry
from ..key_intervals import IntervalTables
from .gpu import Gpu, gpu_of
from .launch import Launch
from .scratch import Masses, batch_stride, power_of_two, reach_of
from .settings import KernelSettings


@triton.jit
def _level(
    masses,
    totals,
    rows,
    reach,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Gives all parts of a row the greatest of their factors, where they are."""
    part = tl.arange(0, SPLITS)
    for row in range(R):
        lines = totals + row + part * rows
        total = tl.load(lines)
        raised_parts = total < 0
        shift = tl.load(lines + SPLITS * rows, mask=raised_parts, other=0.0)
        span = tl.load(lines + 2 * SPLITS * rows, mask=raised_parts, other=0.0)
        highest = tl.max(shift, 0)
        total = tl.sum(tl.abs(total) * tl.exp2(shift - highest), 0)
        # Key blocks to a part, 0 where all parts have one factor; after the last are hidden ones.
        span = tl.max(span, 0).to(tl.int32)
        first = tl.load(lines + 3 * SPLITS * rows, mask=raised_parts, other=0.0)
        first = tl.max(first, 0).to(tl.int32)
        stop = tl.minimum(first + span * SPLITS, reach)
        for start in range(first, stop, SLICE):
            block = start + tl.arange(0, SLICE)
            own = totals + row + (block - first) // span * rows
            inside = block < stop
            moved = tl.load(own, mask=inside, other=0.0) < 0
            raised = tl.load(own + SPLITS * rows, mask=moved, other=0.0)
            place = masses + block * rows + row
            mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            mass *= tl.exp2(raised - highest)
            tl.store(place, mass.to(masses.dtype.element_ty), mask=inside)
        # Before it is written every thread has read, and before it is read all is written.
        tl.debug_barrier()
        tl.store(lines, tl.where(part == 0, total, 0.0))
    tl.debug_barrier()


@triton.jit
def _shares(
    masses,
    totals,
    rows,
    reach,
    key_block,
    visible,
    left,
    bounds,
    R: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    P: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """Each key block's share of a row's mass, averaged over rows by the tokens they stand for.

    ``left`` query tokens exist from the block's first on; with INTERVALS, ``bounds`` of the rows
    say for how many tokens each stands.
    """
    if SPLITS > 1:
        part = tl.arange(0, SPLITS)[:, None] * rows + tl.arange(0, R)[None, :]
        if tl.min(tl.min(tl.load(totals + part), 1), 0) < 0:
            _level(masses, totals, rows, reach, R, SPLITS, P if P < 128 else 128)
    result = tl.zeros([P], dtype=tl.float32)
    tokens = tl.minimum(left, R * STEP).to(tl.float32)
    if INTERVALS:
        counted = tl.sum(tl.load(bounds + tl.arange(0, R) * 3 + 2), 0)
        tokens = tl.maximum(counted, 1).to(tl.float32)
    for start in tl.static_range(0, R, CHUNK):
        row = start + tl.arange(0, CHUNK)
        total = tl.load(totals + row)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(totals + split * rows + row)
        # A row that stands for no token repeats the last one and weighs nothing.
        count = tl.minimum(tl.maximum(left - row * STEP, 0), STEP).to(tl.float32)
        if INTERVALS:
            count = tl.load(bounds + row * 3 + 2).to(tl.float32)
            # A row that sees nothing has no mass.
            total = tl.where(count > 0, total, 1.0)
        factor = count / tokens / total
        place = masses + key_block[:, None] * rows + row[None, :]
        mass = tl.load(place, mask=visible[:, None], other=0.0).to(tl.float32)
        result += tl.sum(mass * factor[None, :], 1)
    return result


@triton.jit
def _reach(score, candidate, weight, need, low, STEPS: tl.constexpr):
    """The best candidates until their weights sum to ``need``; among equals the first.

    The search starts at ``low``, a score that enough candidates reach.
    """
    wanted = candidate & (tl.zeros_like(score) + need > 0)
    # Scores are not negative: their bits are in their order.
    bits = tl.where(wanted, score.to(tl.int32, bitcast=True), -1)
    low = tl.maximum(low, 0.0).to(tl.int32, bitcast=True)
    high = tl.maximum(tl.max(bits, 0), low) + 1
    step = 0
    while (step < STEPS) & (low + 1 < high):
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(bits >= middle, weight, 0.0), 0)
        # Where it is just enough, the search is over.
        low = tl.where(reached > need, middle, tl.where(reached == need, middle - 1, low))
        high = tl.where(reached > need, high, middle)
        step += 1
    above = bits >= high
    rest = need - tl.sum(tl.where(above, weight, 0.0), 0)
    equal = (bits >= low) & (bits < high)
    equals = tl.where(equal, weight, 0.0)
    before = tl.cumsum(equals, 0) - equals
    return wanted & (above | (equal & (before < rest)))


@triton.jit
def _write(counts, indices, at, blocks, key_block, chosen, place, count):
    tl.store(indices + at * blocks + place, key_block, mask=chosen)
    tl.store(counts + at, count)
    # A kernel may read the first index of an empty list.
    tl.store(indices + at * blocks + key_block, 0, mask=key_block + count == 0)


@triton.jit
def _leaves_out(
    keep,
    key_block,
    flags,
    rows,
    first_row,
    q_len,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
):
    """Whether some row of a query block sees keys, but none in the blocks of ``keep``: 0 or 1."""
    SLICE: tl.constexpr = 16
    left_out = 0
    for start in range(0, BLOCK, SLICE):
        row = first_row + start + tl.arange(0, SLICE)
        low = tl.load(rows + row * 2, mask=row < q_len, other=1)
        high = tl.load(rows + row * 2 + 1, mask=row < q_len, other=-1)
        begin = (key_block * BLOCK)[:, None]
        # Its first and last keys are valid, and what lies between where the block has any.
        meets = (begin <= high[None, :]) & (begin + BLOCK > low[None, :])
        meets = meets & (keep & (flags % 2 > 0))[:, None]
        met = tl.max(meets.to(tl.int32), 0)
        left_out = tl.maximum(left_out, tl.max(((high >= low) & (met == 0)).to(tl.int32), 0))
    return left_out


LENGTHS = [
    "kv_heads",
    "stride_rows",
    "stride_blocks",
    "stride_flags",
    "stride_coarse",
    "stride_fine",
    "first_head",
    "first_block",
    "q_blocks",
    "blocks",
    "reach",
    "q_len",
    "kv_len",
    "offset",
    "value",
    "least",
    "sinks",
    "locals_",
    "last_rows",
]


@triton.jit(do_not_specialize=LENGTHS)
def _select(
    coarse,
    coarse_totals,
    fine,
    fine_totals,
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
    row_bounds,
    block_bounds,
    key_flags,
    coarse_bounds,
    fine_bounds,
    head_thresholds,
    stride_rows,
    stride_blocks,
    stride_flags,
    stride_coarse,
    stride_fine,
    kv_heads,
    first_head,
    first_block,
    coarse_rows,
    fine_rows,
    q_blocks,
    blocks,
    reach,
    q_len,
    kv_len,
    offset,
    value,
    least,
    threshold_blocks,
    sinks,
    locals_,
    last_rows,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    MERGED: tl.constexpr,
    COARSE: tl.constexpr,
    COARSE_CHUNK: tl.constexpr,
    COARSE_SPLITS: tl.constexpr,
    FINE: tl.constexpr,
    FINE_CHUNK: tl.constexpr,
    FINE_SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SELF: tl.constexpr,
    P: tl.constexpr,
    INTERVALS: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """COARSE and FINE are rows a query block and head have in either scratch, 0 for none.

    With PER_HEAD a threshold is that of the query head.
    """
    head = tl.program_id(0)
    slot = tl.program_id(2)
    local_block = tl.program_id(1)
    block = first_block + local_block
    key_block = tl.arange(0, P)
    first = block * BLOCK + offset
    last = tl.minimum(block * BLOCK + BLOCK, q_len) - 1 + offset
    visible = key_block < reach
    if CAUSAL:
        visible = visible & (key_block * BLOCK <= last)
    if INTERVALS:
        batch = (first_head + slot) // kv_heads
        flags = tl.load(key_flags + batch * stride_flags + key_block, mask=visible, other=0)
        of_block = block_bounds + batch * stride_blocks + block * 6
        visible = visible & (flags % 2 > 0) & (key_block * BLOCK <= tl.load(of_block + 1))
        visible = visible & (key_block * BLOCK + BLOCK > tl.load(of_block))
        coarse_bounds += batch * stride_coarse + block * COARSE * 3
        fine_bounds += batch * stride_fine + block * FINE * 3

    left = q_len - block * BLOCK
    at = local_block * HEADS + head
    score = tl.zeros([P], dtype=tl.float32)
    if COARSE > 0:
        score += _shares(
            coarse + slot.to(tl.int64) * reach * coarse_rows + at * COARSE,
            coarse_totals + slot.to(tl.int64) * 4 * COARSE_SPLITS * coarse_rows + at * COARSE,
            coarse_rows, reach, key_block, visible, left, coarse_bounds,
            COARSE, BLOCK // COARSE, COARSE_CHUNK, COARSE_SPLITS, P, INTERVALS,
        )  # fmt: skip
    if FINE > 0:
        score += _shares(
            fine + slot.to(tl.int64) * reach * fine_rows + at * FINE,
            fine_totals + slot.to(tl.int64) * 4 * FINE_SPLITS * fine_rows + at * FINE,
            fine_rows, reach, key_block, visible, left, fine_bounds,
            FINE, BLOCK // FINE, FINE_CHUNK, FINE_SPLITS, P, INTERVALS,
        )  # fmt: skip
    if COARSE > 0 and FINE > 0:
        score *= 0.5

    forced = key_block < sinks
    if INTERVALS:
        forced = flags // 4 > 0
    if CAUSAL or SELF:
        after = 0 if CAUSAL else locals_ - 1
        lowest = tl.minimum(first // BLOCK, blocks - 1)
        highest = tl.minimum(last // BLOCK, blocks - 1)
        forced = forced | ((key_block > lowest - locals_) & (key_block <= highest + after))
    # Conditions on the whole row, one lane each: the interpreter joins no scalar with a vector.
    lane = key_block * 0
    if INTERVALS:
        forced = forced | (lane + tl.load(of_block + 5) > 0)
    else:
        forced = forced | (lane + block >= q_blocks - last_rows)
    forced = forced & visible
    judged = lane + tl.sum(tl.where(score != score, 1, 0), 0) == 0
    score = tl.where(visible & judged, score, 0.0)
    candidate = visible & (forced == 0)
    # What a threshold is multiplied by: one number for the row, in every lane.
    sees = tl.maximum(lane + tl.sum(tl.where(visible, 1, 0), 0), 1).to(tl.float32)
    root = tl.sqrt_rn(tl.div_rn(threshold_blocks + 0.0 * sees, sees))
    root = tl.where(lane + threshold_blocks > 0.0, root, 1.0)
    if PER_HEAD:
        own = tl.load(head_thresholds + (first_head + slot) % kv_heads * HEADS + head)
        if RULE == "threshold":
            value = own
        else:
            least = own
    if RULE == "threshold":
        chosen = candidate & (score >= value * root)
        # A row that would keep nothing keeps its highest.
        none = lane + tl.sum(tl.where(forced | chosen, 1, 0), 0) == 0
        highest = tl.max(tl.where(candidate, score, -1.0), 0)
        chosen = chosen | (candidate & none & (score >= highest))
    elif RULE == "top_k":
        one = tl.full([P], 1.0, dtype=tl.float32)
        need = value - tl.sum(tl.where(forced, one, 0.0), 0)
        chosen = _reach(score, candidate, one, need, 0.0 * need, STEPS)
    else:
        need = value - tl.sum(tl.where(forced, score, 0.0), 0)
        # All that score less than this sum to less than may be dropped.
        spare = tl.sum(tl.where(candidate, score, 0.0), 0) - need
        chosen = _reach(score, candidate, score, need, 0.99 * spare / blocks, STEPS)
        if RULE == "top_p_or_threshold":
            chosen = chosen | (candidate & (score >= least * root))
    keep = forced | chosen | (visible & (judged == 0))
    if RULE == "top_p" or RULE == "top_p_or_threshold":
        # An estimate of zero is no proof of zero: all means all.
        keep = keep | (visible & (lane + value >= 1.0))

    if INTERVALS:
        left_out = 0
        if tl.load(of_block + 4) > 0:
            rows = row_bounds + batch * stride_rows
            left_out = _leaves_out(keep, key_block, flags, rows, block * BLOCK, q_len, BLOCK, P)
        keep = keep | (visible & (lane + left_out > 0))

    final = key_block * BLOCK + BLOCK - 1
    inside = final < kv_len
    if INTERVALS:
        inside = (flags // 2 % 2 > 0) & (final <= tl.load(of_block + 3))
        inside = inside & (key_block * BLOCK >= tl.load(of_block + 2))
    elif CAUSAL:
        inside = inside & (final <= first)
    partial = keep & (inside == 0)
    full = keep & inside
    # Both lists' places in one scan: there are fewer than 2 ** 15 blocks.
    packed = full.to(tl.int32) + partial.to(tl.int32) * 65536
    ends = tl.cumsum(packed, 0)
    total = tl.sum(packed, 0)
    for merged in tl.static_range(MERGED):
        out_head = ((first_head + slot) * HEADS + head) * MERGED + merged
        line = out_head.to(tl.int64) * q_blocks + block
        _write(
            partial_counts, partial_indices, line, blocks, key_block, partial,
            ends // 65536 - 1, total // 65536,
        )  # fmt: skip
        _write(
            full_counts, full_indices, line, blocks, key_block, full,
            ends % 65536 - 1, total % 65536,
        )  # fmt: skip


_launch = Launch(_select)

# Key blocks that one warp has to itself, and elements of scratch that it holds at a time.
BLOCKS_OF_A_WARP, MOST_WARPS, WARP_ELEMENTS = 256, 4, 2048


def select(
    coarse: Masses | None,
    fine: Masses | None,
    lists: BlockLists,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    heads: slice,
    q_blocks: slice,
    composite_heads: int,
    intervals: IntervalTables | None = None,
    head_thresholds: Tensor | None = None,
    least_power: int = 1,
) -> None:
    """Fills the lines of ``lists`` that belong to these heads and query blocks.

    Args:
        coarse: Masses of composite queries; ``None`` for none.
        fine: Masses of picked queries; the scores of both are averaged.
        lists: Block lists of all heads and query blocks.
        settings: Which blocks are kept.
        geometry: The block grid.
        heads: Which of the B * Hkv key heads.
        q_blocks: Which query blocks.
        composite_heads: Composite heads that share a key head.
        intervals: What the geometry's mask hides, where it has one.
        head_thresholds: float32 [Hq], those of the settings, where they have any.
        least_power: Key blocks that a program has room for at least, a power of two: fewer
            lengths are compiled for.
    """
    blocks = geometry.num_kv_blocks
    reach = reach_of(geometry, q_blocks)
    count = q_blocks.stop - q_blocks.start
    power = max(power_of_two(reach), least_power)
    given = coarse or fine
    assert given is not None
    parts = [(masses or given, masses is not None) for masses in (coarse, fine)]
    rows = [m.blocks.shape[2] // count // composite_heads * there for m, there in parts]
    warps = max(1, min(MOST_WARPS, power // BLOCKS_OF_A_WARP))
    chunks = [max(1, min(r, warps * WARP_ELEMENTS // power)) for r in rows]
    exact = any(m.blocks.dtype == torch.float32 for m, _ in parts)
    tables = [lists.kv_num_blocks] * 5
    if intervals is not None:
        found = intervals
        tables = [found.rows, found.blocks, found.key_blocks, found.composites, found.samples]
    kv_heads = lists.kv_num_blocks.shape[1] // (composite_heads * settings.c_h)
    _launch(
        (composite_heads, count, heads.stop - heads.start),
        *(tensor for m, _ in parts for tensor in (m.blocks, m.totals)),
        *lists.tensors(),
        *tables,
        lists.kv_num_blocks if head_thresholds is None else head_thresholds,
        *(batch_stride(table) for table in tables),
        kv_heads,
        heads.start,
        q_blocks.start,
        *(m.blocks.shape[2] for m, _ in parts),
        geometry.num_q_blocks,
        blocks,
        reach,
        geometry.q_len,
        geometry.kv_len,
        geometry.causal_offset or 0,
        *(float(number) for number in (*settings.values, 0.0, 0.0)[:3]),
        settings.sink_blocks,
        settings.local_blocks,
        settings.last_query_blocks,
        RULE=settings.rule,
        # All bits of a score, or as many as make a difference.
        STEPS=31 if exact or settings.rule == "top_k" else 15,
        BLOCK=geometry.block_size,
        HEADS=composite_heads,
        MERGED=settings.c_h,
        COARSE=rows[0],
        COARSE_CHUNK=chunks[0],
        COARSE_SPLITS=parts[0][0].totals.shape[2],
        FINE=rows[1],
        FINE_CHUNK=chunks[1],
        FINE_SPLITS=parts[1][0].totals.shape[2],
        CAUSAL=geometry.causal_offset is not None,
        SELF=geometry.q_len == geometry.kv_len,
        P=power,
        INTERVALS=intervals is not None,
        PER_HEAD=head_thresholds is not None,
        num_warps=warps,
        # Lanes that hold the same row add its parts in different orders. Fused with the products
        # before them, the sums would differ in their last bit, and with them what each lane keeps.
        enable_fp_fusion=False,
        **_registers(gpu_of(lists.kv_indices.device)),
    )


def _registers(gpu: Gpu) -> dict[str, int]:
    """Registers of a thread, where the compiler by itself would take too few to hold all."""
    return {"maxnreg": 144} if gpu.capability >= (12, 0) and not gpu.is_amd else {}
