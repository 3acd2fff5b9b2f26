"""Block scores from composite tokens and sampled rows: the reference that kernels are judged by.

Symbols: B batch, Hq/Hkv heads, Hs composite heads, Cq/Ck composite tokens, Nq/Nk blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import BlockGeometry
from .granularity import CompositeKeys, Pooled, Sampled, pool_heads, pool_tokens, split_tokens
from .mask_summary import MaskSummary, expand_mask
from .masks import visible_tokens


def compute_mean_scores(
    query: Tensor,
    key: Tensor,
    *,
    geometry: BlockGeometry,
    granularities: Sequence[Pooled | Sampled],
    scale: float,
    attn_mask: Tensor | None = None,
    mask: MaskSummary | None = None,
) -> Tensor:
    """Averages the scores at several granularities of the same heads.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: The block grid.
        granularities: At least one; see `compute_block_scores` and `compute_sampled_scores`.
        scale: Factor on the logits, as in SDPA.
        attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv].
        mask: Its summary, made with the `Pooled` among them.

    Returns:
        [B, Hs, Nq, Nk], as `compute_block_scores`.
    """
    found = [
        compute_block_scores(
            query,
            key,
            geometry=geometry,
            granularity=granularity,
            scale=scale,
            mask=mask,
        )
        if isinstance(granularity, Pooled)
        else compute_sampled_scores(
            query,
            key,
            geometry=geometry,
            granularity=granularity,
            scale=scale,
            attn_mask=attn_mask,
        )
        for granularity in granularities
    ]
    first, *others = found
    return sum(others, first) / len(found) if others else first


def compute_block_scores(
    query: Tensor,
    key: Tensor | CompositeKeys,
    *,
    geometry: BlockGeometry,
    granularity: Pooled,
    scale: float,
    mask: MaskSummary | None = None,
) -> Tensor:
    """Estimates the share of attention mass that each block holds (UniSparse, section 3).

    Softmax attention among composite tokens, causal on composites, summed over the cells of each
    block and averaged over its composite rows, each weighted by its true count of query rows.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D], or what was pooled from it by ``granularity.k``.
        geometry: The block grid.
        granularity: How tokens and heads are pooled.
        scale: Factor on the logits, as in SDPA.
        mask: Summary of the call's ``attn_mask``, made with the same granularity.

    Returns:
        [B, Hs, Nq, Nk] with Hs = Hq / granularity.heads, float32 (float64 for float64 inputs).
        A row sums to 1, to 0 where its queries see nothing, and is NaN where a query or key that
        takes part in it is not finite.
    """
    logits, q_counts = composite_logits(
        query, key, geometry=geometry, granularity=granularity, scale=scale, mask=mask
    )
    size = geometry.block_size
    groups = (size // granularity.q, size // granularity.k)
    return block_shares(logits, q_counts, geometry, groups)


def composite_logits(
    query: Tensor,
    key: Tensor | CompositeKeys,
    *,
    geometry: BlockGeometry,
    granularity: Pooled,
    scale: float,
    mask: MaskSummary | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits among composite tokens; the arguments are those of `compute_block_scores`.

    Returns:
        [B, Hkv, G / granularity.heads, Cq, Ck], with the log of a ragged key's share of its group
        added and -inf where hidden; and the query rows of each composite, [1 or B, Cq].
    """
    batch = query.shape[0]
    query_valid = mask.query_valid.expand(batch, -1) if mask is not None else None
    q_groups, kv_groups = geometry.num_groups(granularity.q, granularity.k)
    composite_q, q_counts = pool_tokens(query, granularity.q, groups=q_groups, valid=query_valid)
    if isinstance(key, CompositeKeys):
        composite_k, k_counts = key.tokens, key.counts
    else:
        key_valid = mask.key_valid.expand(batch, -1) if mask is not None else None
        composite_k, k_counts = pool_tokens(key, granularity.k, groups=kv_groups, valid=key_valid)
    kv_heads = composite_k.shape[1]
    composite_q = pool_heads(composite_q, kv_heads, granularity.heads)

    # One product per key head; keys are never repeated for the heads of their group.
    group, rows, head_dim = composite_q.shape[2:]
    stacked = composite_q.reshape(batch, kv_heads, group * rows, head_dim) * scale
    columns = composite_k.shape[2]
    logits = (stacked @ composite_k.transpose(-1, -2)).view(batch, kv_heads, group, rows, columns)
    return hide_cells(logits, k_counts, geometry, granularity, mask), q_counts


def compute_antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    geometry: BlockGeometry,
    stride: int,
    scale: float,
    mask: MaskSummary | None = None,
) -> Tensor:
    """Estimates the share of mass of each block from antidiagonals (XAttention, section 2.1).

    A cell of ``stride`` rows and keys has the mean of its antidiagonal's logits: row
    ``stride - 1 - i`` meets key ``i``. A token that is missing, after the end or masked, is
    replaced by the mean of its group. What follows is as in `compute_block_scores`.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: The block grid.
        stride: Rows and keys of a cell; divides the block size.
        scale: Factor on the logits, as in SDPA.
        mask: Summary of the call's ``attn_mask``, made with ``c_q = c_k = stride``.

    Returns:
        [B, Hq, Nq, Nk], as `compute_block_scores`.
    """
    batch, kv_heads = key.shape[:2]
    query_valid = mask.query_valid.expand(batch, -1) if mask is not None else None
    key_valid = mask.key_valid.expand(batch, -1) if mask is not None else None
    rows, columns = geometry.num_groups(stride, stride)
    split_q, q_counts = split_tokens(query, stride, groups=rows, valid=query_valid)
    split_k, k_counts = split_tokens(key, stride, groups=columns, valid=key_valid)
    group, width = query.shape[1] // kv_heads, stride * query.shape[3]
    stacked = split_q.flip(3).reshape(batch, kv_heads, group * rows, width) * (scale / stride)
    flat_k = split_k.reshape(batch, kv_heads, columns, width)
    logits = (stacked @ flat_k.transpose(-1, -2)).view(batch, kv_heads, group, rows, columns)
    granularity = Pooled(q=stride, k=stride)
    logits = hide_cells(logits, k_counts, geometry, granularity, mask)
    size = geometry.block_size // stride
    return block_shares(logits, q_counts, geometry, (size, size))


def compute_pooled_key_scores(
    query: Tensor,
    key: Tensor | CompositeKeys,
    *,
    geometry: BlockGeometry,
    scale: float,
    mask: MaskSummary | None = None,
) -> Tensor:
    """Scores blocks by every query of a row of blocks against the blocks' mean keys (FlashPrefill).

    A block's score is the sum over rows of exp(logit - the highest logit of the row of blocks),
    times its keys: rows with higher logits count more, unlike in `compute_block_scores`. A row
    meets the mean of a block of which it sees the first key.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D], or what was pooled from it by blocks.
        geometry: The block grid.
        scale: Factor on the logits, as in SDPA.
        mask: Summary of the call's ``attn_mask``, made with ``c_q = 1, c_k = block_size``.

    Returns:
        [B, Hq, Nq, Nk], float32 (float64 for float64 inputs). A row sums to 1, to 0 where its
        queries see nothing, and is NaN as in `compute_block_scores`.
    """
    granularity = Pooled(q=1, k=geometry.block_size)
    logits, counts = composite_logits(
        query, key, geometry=geometry, granularity=granularity, scale=scale, mask=mask
    )
    logits = logits.masked_fill(counts[:, None, None, :, None] == 0, -math.inf)
    tiles = logits.unflatten(3, (geometry.num_q_blocks, geometry.block_size))
    peak = tiles.amax((-2, -1), keepdim=True)
    weights = (tiles - peak.masked_fill(peak == -math.inf, 0.0)).exp().sum(-2)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).flatten(1, 2)


def compute_sampled_scores(
    query: Tensor,
    key: Tensor,
    *,
    geometry: BlockGeometry,
    granularity: Sampled,
    scale: float,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Estimates the share of attention mass that each block holds, from a few rows of each block.

    Softmax attention of the sampled rows over all keys, summed over the keys of each block and
    averaged over the rows, each weighted by the rows of its group that exist and see something.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: The block grid.
        granularity: Which rows are sampled.
        scale: Factor on the logits, as in SDPA.
        attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv].

    Returns:
        [B, Hs, Nq, Nk] with Hs = Hq / granularity.heads, float32 (float64 for float64 inputs), as
        `compute_block_scores`.
    """
    logits, counts = sampled_logits(
        query, key, geometry=geometry, granularity=granularity, scale=scale, attn_mask=attn_mask
    )
    groups = (granularity.queries, geometry.block_size)
    return block_shares(logits, counts, geometry, groups)


def sampled_logits(
    query: Tensor,
    key: Tensor,
    *,
    geometry: BlockGeometry,
    granularity: Sampled,
    scale: float,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of sampled rows; the arguments are those of `compute_sampled_scores`.

    Returns:
        [B, Hkv, G / granularity.heads, Nq * granularity.queries, Nk * block_size], -inf where
        hidden; and the query rows that each stands for, [1, Nq * granularity.queries].
    """
    size, samples = geometry.block_size, granularity.queries
    step, rows = size // samples, geometry.num_q_blocks * samples
    kv_heads = key.shape[1]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    first = torch.arange(rows, device=query.device) * step
    position = (first + step).clamp(max=geometry.q_len) - 1
    counts = (geometry.q_len - first).clamp(0, step).to(accumulate)[None]
    sampled = query[:, :, position]
    if granularity.heads > 1 or not _multiplies_exactly(query):
        sampled, key = sampled.to(accumulate), key.to(accumulate)
    sampled = pool_heads(sampled, kv_heads, granularity.heads)
    batch, _, group, _, head_dim = sampled.shape
    stacked = sampled.reshape(batch * kv_heads, group * rows, head_dim)
    keys = key.reshape(batch * kv_heads, key.shape[2], head_dim).transpose(-1, -2)
    if stacked.dtype == accumulate:
        logits = (stacked * scale) @ keys
    else:
        logits = torch.bmm(stacked, keys, out_dtype=accumulate) * scale
    logits = logits.view(batch, kv_heads, group, rows, key.shape[2])

    column = torch.arange(geometry.kv_len, device=query.device)
    if geometry.hides_keys:
        seen = geometry.pairs(position, column)
        seen = seen if seen.dim() == 2 else seen[:, :, None]
        logits = logits.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        mask = expand_mask(attn_mask, geometry)[:, :, position]
        bias = torch.zeros_like(mask, dtype=accumulate) if mask.dtype is torch.bool else mask
        bias = bias.to(accumulate).masked_fill(~visible_tokens(mask), -math.inf)
        bias = merge_heads(bias, kv_heads, granularity.heads)
        logits = (logits + bias).masked_fill(bias == -math.inf, -math.inf)
    padding = geometry.num_kv_blocks * size - geometry.kv_len
    if not isinstance(padding, int) or padding:
        logits = F.pad(logits, (0, padding), value=-math.inf)
    return logits, counts


def _multiplies_exactly(tokens: Tensor) -> bool:
    """Whether products of these tokens are summed in float32 without a float32 copy of them.

    Tensor cores do, and ten times as fast as float32's own products.
    """
    is_half = tokens.dtype in (torch.float16, torch.bfloat16)
    return is_half and tokens.device.type == "cuda" and torch.version.hip is None


def block_shares(
    logits: Tensor, counts: Tensor, geometry: BlockGeometry, groups: tuple[int, int]
) -> Tensor:
    """Softmax over columns, summed over a block's and averaged over its rows by their counts.

    Args:
        logits: [B, Hkv, G, Nq * groups[0], Nk * groups[1]], -inf where hidden.
        counts: [1 or B, Nq * groups[0]], query rows that each row stands for.
        geometry: The block grid.
        groups: Rows and columns of a block.

    Returns:
        [B, Hkv * G, Nq, Nk].
    """
    mass, total, share = row_masses(logits, counts, geometry, groups)
    return (mass * (share / total)).sum(-2).flatten(1, 2)


def row_masses(
    logits: Tensor, counts: Tensor, geometry: BlockGeometry, groups: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `block_shares` averages; it has the arguments.

    Returns:
        Each row's mass of every block, [B, Hkv, G, Nq, groups[0], Nk]; its whole mass, 1 where
        that is 0; and its share of the rows of its block, [B, Hkv, G, Nq, groups[0], 1] both.
    """
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -math.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    row_weight = counts[:, None, None, :, None] * (total != 0)
    rows = (geometry.num_q_blocks, groups[0])
    leading = logits.shape[:3]
    mass = weights.view(*leading, *rows, geometry.num_kv_blocks, groups[1]).sum(-1)
    row_weight = row_weight.view(*leading, *rows, 1)
    share = row_weight / row_weight.sum(-2, keepdim=True).clamp_min(1)
    total = total.masked_fill(total == 0, 1.0).view(*leading, *rows, 1)
    return mass, total, share


def hide_cells(
    logits: Tensor,
    k_counts: Tensor,
    geometry: BlockGeometry,
    granularity: Pooled,
    mask: MaskSummary | None,
) -> Tensor:
    """Weighs cells by their keys and hides those without a visible pair.

    Args:
        logits: [B, Hkv, G / granularity.heads, Cq, Ck].
        k_counts: Keys of each composite key, [1 or B, Ck].
        geometry: The block grid.
        granularity: Rows, keys and heads of a cell.
        mask: Summary of the call's ``attn_mask``, made with the same granularity.

    Returns:
        The logits plus log(keys / granularity.k) and the mask's bias; -inf where hidden.
    """
    bias = (k_counts / granularity.k).log()[:, None, None, None, :]
    if mask is not None:
        bias = bias + merge_heads(mask.cell_bias, logits.shape[1], granularity.heads)
    bias = bias.to(logits.dtype)
    visible = geometry.visible(granularity.q, granularity.k, logits.device)
    # After the addition: what is hidden stays hidden, a NaN too.
    return (logits + bias).masked_fill(~visible | (bias == -math.inf), -math.inf)


def merge_heads(bias: Tensor, kv_heads: int, heads: int) -> Tensor:
    """A bias [Bm, Hm, rows, columns] as [Bm, 1 or Hkv, 1 or G / heads, rows, columns]."""
    if bias.shape[1] == 1:
        return bias[:, :, None]
    per_head = bias.unflatten(1, (kv_heads, -1, heads))
    return per_head.logsumexp(3) - math.log(heads)


def default_scale(head_dim: int) -> float:
    """SDPA's default factor on the logits."""
    return 1.0 / math.sqrt(head_dim)


def supports_dtype(dtype: torch.dtype) -> bool:
    """Whether scores can be computed from tokens of ``dtype``."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
