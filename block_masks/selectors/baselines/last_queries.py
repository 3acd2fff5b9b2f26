"""What the last queries say about columns and diagonals of the attention map.

FlexPrefill and MInference judge a head by the attention of its last queries: a column is one key,
a diagonal is one distance from a query back to a key.

Symbols: B batch, Hq/Hkv heads, S tokens, L last queries, P key positions of queries
(q_len + causal_offset), Nq/Nk blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import BlockGeometry
from ...selection import ForcedBlocks, Threshold, select_blocks
from ...strides import fix_strides


def validate_causal_only(name: str, geometry: BlockGeometry, attn_mask: Tensor | None) -> None:
    """Raises ValueError unless the call is causal and has no other mask."""
    got = None
    if attn_mask is not None or geometry.mask is not None:
        got = "a mask"
    elif geometry.causal_offset is None:
        got = "a call that is not causal"
    if got is not None:
        raise ValueError(
            f"{name} must have is_causal or causal_lower_right and no other mask, because it "
            "judges all rows by the last queries and by distances back from them, got "
            f"{got}; use UniSparse there"
        )


def last_positions(count: int, geometry: BlockGeometry, device: torch.device) -> Tensor:
    """Row indices of the last ``count`` queries, int64 [count]; negative for rows that are not."""
    return torch.arange(count, device=device) - count + geometry.q_len


def attend_last(
    query: Tensor, key: Tensor, *, count: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """Attention of the last ``count`` queries over all keys, each divided by their number.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        count: L; where there are fewer queries, the first rows of the result are zero.
        geometry: The block grid, causal.
        scale: Factor on the logits.

    Returns:
        [B, Hq, L, Skv], float32 (float64 for float64 inputs), in all 1 per head; NaN where a
        query or a key that is seen is not finite.
    """
    assert geometry.causal_offset is not None
    kv_heads = key.shape[1]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = last_positions(count, geometry, query.device)
    last = query[:, :, row.clamp(min=0)].to(accumulate) * scale
    stacked = last.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = stacked @ key.to(accumulate).transpose(-1, -2)
    logits = logits.unflatten(2, (-1, count)).flatten(1, 2)
    # An infinity could vanish in the softmax.
    logits = torch.where(logits.isfinite(), logits, float("nan"))
    column = torch.arange(geometry.kv_len, device=query.device)
    exists = row[:, None] >= 0
    seen = exists & geometry.pairs(row, column)
    shares = logits.masked_fill(~seen, -math.inf).softmax(-1) / exists.sum()
    return shares.masked_fill(~seen, 0.0)


def sum_columns(shares: Tensor) -> Tensor:
    """Mass of every key: [B, Hq, L, Skv] to [B, Hq, Skv]."""
    return _sum_rows(shares)


def sum_diagonals(shares: Tensor, geometry: BlockGeometry) -> Tensor:
    """Mass of every distance back from a query to a key: [B, Hq, L, Skv] to [B, Hq, P]."""
    assert geometry.causal_offset is not None
    device, positions = shares.device, geometry.q_len + geometry.causal_offset
    row = last_positions(shares.shape[-2], geometry, device)
    column = row[:, None] + geometry.causal_offset - torch.arange(positions, device=device)
    inside = (column >= 0) & (column < geometry.kv_len)
    column = column.clamp(min=0).clamp(max=geometry.kv_len - 1)
    moved = shares.gather(-1, column.expand(*shares.shape[:2], -1, -1))
    return _sum_rows(moved.masked_fill(~inside, 0.0))


def _sum_rows(shares: Tensor) -> Tensor:
    # In halves: every column is added in the same order, so that equal columns have equal sums.
    rows = shares.shape[-2]
    while rows > 1:
        half = rows // 2
        pairs = shares[..., :half, :] + shares[..., half : 2 * half, :]
        shares = torch.cat([pairs, shares[..., 2 * half :, :]], -2) if rows % 2 else pairs
        rows -= half
    return shares[..., 0, :]


def sum_blocks(mass: Tensor, size: int) -> Tensor:
    """Sums of every ``size`` consecutive entries of the last axis, the last ones padded by 0."""
    blocks = (mass.shape[-1] + size - 1) // size
    return F.pad(mass, (0, blocks * size - mass.shape[-1])).unflatten(-1, (blocks, size)).sum(-1)


def keep_highest(mass: Tensor, counts: Tensor | int) -> Tensor:
    """The ``counts`` highest entries of the last axis as a bool mask; ties to the lower index.

    Args:
        mass: [..., N].
        counts: How many, broadcastable to [..., 1].
    """
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(mass.shape[-1], device=mass.device)
    kept = (rank < counts).expand_as(order)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def blocks_on_diagonals(chosen: Tensor, geometry: BlockGeometry, step: int) -> Tensor:
    """The blocks that a chosen diagonal passes through.

    Args:
        chosen: bool [B, H, ceil(P / step)]; entry n stands for a distance of n * step keys.
        geometry: The block grid, causal.
        step: Keys between two diagonals.

    Returns:
        bool [B, H, Nq, Nk]: some row of the query block has a key of the key block at a chosen
        distance before its own position.
    """
    assert geometry.causal_offset is not None
    device, size = chosen.device, geometry.block_size
    first_row = torch.arange(geometry.num_q_blocks, device=device) * size + geometry.causal_offset
    last_row = geometry.last_positions(size, geometry.num_q_blocks, device)
    first_key = torch.arange(geometry.num_kv_blocks, device=device) * size
    last_key = (first_key + size).clamp(max=geometry.kv_len) - 1
    nearest, farthest = first_row[:, None] - last_key, last_row[:, None] - first_key
    # Chosen diagonals before `end` less those before `start`. Divided before it is clamped:
    # Inductor fails where a maximum stands under a division.
    start = ((nearest + step - 1) // step).clamp(min=0)
    start, end = fix_strides([start, (farthest // step + 1).clamp(min=0)])
    before = F.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
    return before[..., end] > before[..., start]


def select_lines(
    lines: Tensor,
    query: Tensor,
    shares: Tensor,
    *,
    forced_blocks: ForcedBlocks,
    geometry: BlockGeometry,
) -> tuple[Tensor, Tensor]:
    """Keeps the blocks that columns and diagonals hold, and the forced ones.

    Args:
        lines: bool [B, Hq, Nq, Nk].
        query: [B, Hq, Sq, D].
        shares: Mass of columns, [B, Hq, Skv]; a head whose mass is NaN keeps every block.
        forced_blocks: Which blocks are kept in any case.
        geometry: The block grid.

    Returns:
        keep, bool [B, Hq, Nq, Nk], and the visible blocks, bool [1, 1, Nq, Nk]. A query block
        that holds a query that is not finite keeps every visible block.
    """
    size, blocks = geometry.block_size, geometry.num_q_blocks
    spoilt = F.pad(~query.isfinite().all(-1), (0, blocks * size - geometry.q_len))
    unjudged = spoilt.unflatten(-1, (blocks, size)).any(-1) | shares.isnan().any(-1, keepdim=True)
    scores = lines.float().masked_fill(unjudged[..., None], float("nan"))
    return select_blocks(
        scores, rule=Threshold(threshold=1.0), forced_blocks=forced_blocks, geometry=geometry
    )
