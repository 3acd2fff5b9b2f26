"""Composite tokens on the GPU: one streaming pass over queries or keys.

Symbols: B batch, H composite heads, S tokens, D head_dim, N blocks, R groups of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .recording import empty
from .scratch import Rows, power_of_two


@triton.jit(do_not_specialize=["length", "blocks", "kv_heads", "stride_valid"])
def _pool(
    tokens,
    means,
    lasts,
    valid,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    length,
    blocks,
    kv_heads,
    head_dim,
    stride_valid,
    MERGED: tl.constexpr,
    HEADS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Means of GROUP tokens and, of every STEP tokens, the last: 0 for none of either.

    With MASKED, means are of the tokens that ``valid`` marks, and 0 where there are none.

    MERGED consecutive heads are averaged; HEADS composite heads share a key head. The means of
    HELD blocks are interleaved: first those of their first groups.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    column = tl.arange(0, WIDTH)
    inside = column < head_dim
    base = tokens + batch.to(tl.int64) * stride_b + head.to(tl.int64) * MERGED * stride_h
    # Rows of a block lie together, those of the heads that share keys after one another.
    kv_head = head // HEADS
    line = (batch * kv_heads + kv_head).to(tl.int64) * blocks
    slot = (line + block) * HEADS + head % HEADS
    if GROUP > 0:
        groups: tl.constexpr = BLOCK // GROUP
        first = block * BLOCK + tl.arange(0, groups) * GROUP
        total = tl.zeros([groups, WIDTH], dtype=tl.float32)
        marked = tl.zeros([groups], dtype=tl.int32)
        for merged in tl.static_range(MERGED):
            for i in tl.static_range(GROUP):
                row = first + i
                at = base + merged * stride_h + row[:, None].to(tl.int64) * stride_s
                counted = row < length
                if MASKED:
                    mark = tl.load(valid + batch * stride_valid + row, mask=counted, other=0)
                    counted = mark > 0
                    marked += counted.to(tl.int32)
                exists = counted[:, None] & inside[None, :]
                total += tl.load(at + column[None, :] * stride_d, mask=exists, other=0.0).to(
                    tl.float32
                )
        count = tl.minimum(tl.maximum(length - first, 1), GROUP) * MERGED
        if MASKED:
            count = tl.maximum(marked, 1)
        mean = total / count[:, None].to(tl.float32)
        # A NaN in the scores keeps a row whole; an infinity could vanish in a softmax.
        mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
        first_held = (line + block // HELD * HELD) * HEADS + head % HEADS
        place = first_held * groups + tl.arange(0, groups) * HELD + block % HELD
        at = means + place[:, None] * head_dim + column[None, :]
        tl.store(at, mean.to(means.dtype.element_ty), mask=inside[None, :])
    if STEP > 0:
        steps: tl.constexpr = BLOCK // STEP
        row = tl.minimum(block * BLOCK + (tl.arange(0, steps) + 1) * STEP, length) - 1
        total = tl.zeros([steps, WIDTH], dtype=tl.float32)
        for merged in tl.static_range(MERGED):
            at = base + merged * stride_h + row[:, None].to(tl.int64) * stride_s
            total += tl.load(at + column[None, :] * stride_d, mask=inside[None, :], other=0.0).to(
                tl.float32
            )
        step = tl.arange(0, steps)
        at = lasts + (slot * steps + step[:, None]) * head_dim + column[None, :]
        tl.store(at, (total / MERGED).to(lasts.dtype.element_ty), mask=inside[None, :])


_launch = Launch(_pool)


def pool(
    tokens: Tensor,
    *,
    kv_heads: int,
    blocks: int,
    block_size: int,
    merged: int = 1,
    group: int = 0,
    step: int = 0,
    held: int = 1,
    valid: Tensor | None = None,
) -> tuple[Rows | None, Rows | None]:
    """Averages groups of tokens and picks single ones, in one pass.

    Args:
        tokens: [B, H * merged, S, D].
        kv_heads: Key heads that the heads are grouped by; divides H.
        blocks: Blocks in the result, ``ceil(S / block_size)`` or more.
        block_size: Tokens per block.
        merged: Consecutive heads that are averaged into one.
        group: Tokens per mean; 0 for no means.
        step: Of every ``step`` tokens the last is picked; 0 for none.
        held: Blocks whose means are interleaved, the first of each block first; divides
            ``blocks``, and is 1 where several heads share a key head.
        valid: uint8 [1 or B, S], tokens that count in means; all by default.

    Returns:
        The means and the picked tokens, in the dtype of ``tokens``; ``None`` where not asked for.
    """
    batch, heads, length, head_dim = tokens.shape
    per_kv = heads // merged // kv_heads

    def rows_of(size: int) -> Rows | None:
        if not size:
            return None
        shape = (batch * kv_heads, blocks * per_kv * (block_size // size), head_dim)
        return Rows(empty(tokens, shape), size)

    means, lasts = rows_of(group), rows_of(step)
    _launch(
        (blocks, heads // merged, batch),
        tokens,
        tokens if means is None else means.tokens,
        tokens if lasts is None else lasts.tokens,
        tokens if valid is None else valid,
        *tokens.stride(),
        length,
        blocks,
        kv_heads,
        head_dim,
        0 if valid is None or valid.shape[0] == 1 else length,
        MERGED=merged,
        HEADS=per_kv,
        HELD=held,
        BLOCK=block_size,
        GROUP=group,
        STEP=step,
        WIDTH=power_of_two(head_dim),
        MASKED=valid is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return means, lasts
