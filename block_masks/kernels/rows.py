"""Summaries of units whose keys lie one after the other: those that the latest rows wrote to.

Symbols: B sequences, Hkv key heads, S places for keys, U keys of a unit, n units, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pages import OF_WARP, _summarize_unit
from .scratch import power_of_two


@triton.jit(do_not_specialize=["rows"])
def _summarize_rows(
    keys,
    lengths,
    numbers,
    scales,
    stride_sequence,
    stride_head,
    stride_row,
    rows,
    heads,
    units,
    head_dim,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One unit of one sequence and key head."""
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    length = tl.load(lengths + sequence)
    unit = tl.maximum(length - rows, 0) // UNIT + tl.program_id(0)
    first = unit * UNIT
    if first < length:
        column = tl.arange(0, WIDTH)
        row = first + tl.arange(0, UNIT)
        held = (row < length)[:, None]
        base = keys + sequence * stride_sequence + head * stride_head
        at = base + row.to(tl.int64)[:, None] * stride_row + column[None, :]
        inside = held & (column < head_dim)[None, :]
        key = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        size = tl.minimum(length - first, UNIT).to(tl.float32)
        line = (sequence * heads + head) * units + unit
        _summarize_unit(key, held, size, numbers, scales, line, head_dim, column)


_launch = Launch(_summarize_rows)


def summarize_rows(
    keys: Tensor, lengths: Tensor, numbers: Tensor, scales: Tensor, *, rows: int, unit: int
) -> None:
    """Brings the units of the last rows up to date; `pages.summarize_rows` on the GPU.

    Args:
        keys: [B, Hkv, S, D], numbers of a key side by side; n * U is S.
        lengths: int32 [B], keys of each sequence, the rows included.
        numbers: int8 [B, Hkv, n, 2, D], contiguous.
        scales: [B, Hkv, n, 2], contiguous.
        rows: How many were written to each sequence, at its end; above 0.
        unit: U, a power of two.
    """
    batch, heads, _, head_dim = keys.shape
    width = power_of_two(head_dim)
    # A row more than a unit's may lie in three units, two in two.
    touched = -(-(rows - 1) // unit) + 1
    _launch(
        (touched, batch * heads, 1),
        keys,
        lengths,
        numbers,
        scales,
        *keys.stride()[:3],
        rows,
        heads,
        numbers.shape[2],
        head_dim,
        UNIT=unit,
        WIDTH=width,
        num_warps=min(4, max(1, unit * width // OF_WARP)),
        enable_fp_fusion=True,
    )
