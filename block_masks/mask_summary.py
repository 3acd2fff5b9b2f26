"""What an ``attn_mask`` says about composite tokens and blocks.

Symbols: Bm/Hm the mask's batch and heads (1 or B, 1 or Hq), Cq/Ck composite tokens, Nk key blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import BlockGeometry
from .masks import Tiles, is_known, mask_4d, row_spans, tile_bounds, visible_tokens
from .strides import fix_strides


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskSummary:
    """An attention mask reduced to what scoring and selection need.

    Attributes:
        cell_bias: float64 [Bm, Hm, Cq, Ck], log of the mean of ``exp(mask)`` over the visible
            pairs of a cell (0 for a bool mask); -inf where nothing is visible.
        visible_blocks: bool [Bm, Hm, Nq, Nk], blocks that hold a visible pair.
        key_valid: bool [Bm, Skv], keys that some query sees.
        query_valid: bool [Bm, Sq], queries that see some key.
        row_blocks: bool [Bm, Hm, Nq * block_size, Nk], which key blocks each query row sees;
            ``None`` where every row sees its own position.
        row_sees: bool [Bm, Hm, Nq * block_size], rows that see some key.
    """

    cell_bias: Tensor
    visible_blocks: Tensor
    key_valid: Tensor
    query_valid: Tensor
    row_blocks: Tensor | None
    row_sees: Tensor | None


def expand_mask(attn_mask: Tensor, geometry: BlockGeometry) -> Tensor:
    """Views a broadcastable mask as [Bm, Hm, Sq, Skv] without copying."""
    return mask_4d(attn_mask).expand(-1, -1, geometry.q_len, geometry.kv_len)


def summarize_mask(
    attn_mask: Tensor, geometry: BlockGeometry, *, c_q: int, c_k: int
) -> MaskSummary:
    """Reduces ``attn_mask`` to composite cells and blocks.

    Args:
        attn_mask: bool or floating, broadcastable to [B, Hq, Sq, Skv].
        geometry: The block grid.
        c_q: Query rows per composite query.
        c_k: Keys per composite key.

    Returns:
        The summary; its size is that of the mask over ``min(c_q * c_k, block_size)``.
    """
    mask = expand_mask(attn_mask, geometry)
    visible = visible_tokens(mask)
    size = geometry.block_size
    q_groups, kv_groups = geometry.num_groups(c_q, c_k)
    rows, keys = q_groups * c_q, kv_groups * c_k
    padding = (0, keys - geometry.kv_len, 0, rows - geometry.q_len)
    padded = F.pad(visible, padding)
    batch, heads = mask.shape[:2]

    cells = (batch, heads, q_groups, c_q, kv_groups, c_k)
    pairs = padded.view(cells).sum((3, 5)).double()
    if mask.dtype is torch.bool:
        log_mean = torch.zeros_like(pairs)
    else:
        accumulate = torch.float64 if mask.dtype is torch.float64 else torch.float32
        bias = mask.to(accumulate).masked_fill(~visible, -math.inf)
        log_sum = F.pad(bias, padding, value=-math.inf).view(cells).logsumexp((3, 5))
        log_mean = log_sum - pairs.clamp_min(1).log()
    row_blocks = padded.view(batch, heads, rows, geometry.num_kv_blocks, size).any(-1)
    return MaskSummary(
        # A cell in part visible counts whole, as one on the causal diagonal does.
        cell_bias=log_mean.masked_fill(pairs == 0, -math.inf),
        visible_blocks=row_blocks.view(
            batch, heads, rows // size, size, geometry.num_kv_blocks
        ).any(-2),
        key_valid=visible.any((1, 2)),
        query_valid=visible.any(3).any(1),
        row_blocks=row_blocks,
        row_sees=row_blocks.any(-1),
    )


def summarize_program(
    geometry: BlockGeometry, *, c_q: int, c_k: int, device: torch.device
) -> MaskSummary:
    """What the geometry's `mask` says about composite cells and blocks, without any pairs.

    Args:
        geometry: The block grid; its ``mask`` is given.
        c_q: Query rows per composite query.
        c_k: Keys per composite key.
        device: Where the result lives.

    Returns:
        The summary, with Hm = 1. Where the mask is more than spans of keys (see `row_spans`), a
        block, key or query may be called visible that is not, and a row's block may not.
    """
    assert geometry.mask is not None
    size, kv_blocks = geometry.block_size, geometry.num_kv_blocks
    spans = row_spans(geometry.mask, geometry.causal_offset, device)
    may_cells, _ = geometry.mask_bounds(c_q, c_k, device)
    may_blocks, _ = geometry.mask_bounds(size, size, device)

    rows = geometry.num_q_blocks * size
    padded = spans.padded(rows)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    (sees,) = fix_strides([padded.seen_between(start, start + geometry.kv_len)[..., 0]])
    row_blocks = row_sees = None
    if not geometry.sees_own_position():
        first = torch.arange(kv_blocks, device=device) * size
        row_blocks = padded.seen_between(first, first + size)
        if spans.rest is not None:
            tiles = Tiles(1, rows, size, kv_blocks)
            row_blocks = row_blocks & tile_bounds(spans.rest, tiles, device)[1][:, 0]
            row_blocks = row_blocks | _own_blocks(geometry, rows, device)
        row_blocks, row_sees = row_blocks[:, None], sees[:, None]
    return MaskSummary(
        cell_bias=torch.zeros_like(may_cells, dtype=torch.float64).masked_fill(
            ~may_cells, -math.inf
        ),
        visible_blocks=may_blocks,
        key_valid=spans.key_valid,
        query_valid=sees[:, : geometry.q_len],
        row_blocks=row_blocks,
        row_sees=row_sees,
    )


def _own_blocks(geometry: BlockGeometry, rows: int, device: torch.device) -> Tensor:
    """The block of each row's own position, where the row sees that key: bool [Bm, rows, Nk]."""
    mask, offset = geometry.mask, geometry.causal_offset
    assert mask is not None
    block = torch.arange(geometry.num_kv_blocks, device=device)
    if offset is None:
        if not is_known(geometry.has_rows_for_keys()):
            return torch.zeros((1, rows, geometry.num_kv_blocks), dtype=torch.bool, device=device)
        offset = geometry.rows_before
    row = torch.arange(rows, device=device)
    own = row + offset
    exists = (row < geometry.q_len) & (own >= 0) & (own < geometry.kv_len)
    row, own = row.clamp(max=geometry.q_len - 1), own.clamp(0, geometry.kv_len - 1)
    b = torch.arange(mask.batch if mask.varies_in_batch else 1, device=device)
    sees = mask.evaluate(b[:, None], row, own) & exists
    return sees[..., None] & (block == own[:, None] // geometry.block_size)


def summarize(
    attn_mask: Tensor | None, geometry: BlockGeometry, *, c_q: int, c_k: int, device: torch.device
) -> MaskSummary | None:
    """The summary of ``attn_mask`` or of the geometry's `mask`; ``None`` where there is neither."""
    if attn_mask is not None:
        return summarize_mask(attn_mask, geometry, c_q=c_q, c_k=c_k)
    if geometry.mask is not None:
        return summarize_program(geometry, c_q=c_q, c_k=c_k, device=device)
    return None
