"""Block scores from composite tokens: the reference that kernels are judged by.

Symbols: B batch, Hq/Hkv heads, Hs composite heads, Cq/Ck composite tokens, Nq/Nk blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .geometry import BlockGeometry
from .granularity import Pooled, pool_heads, pool_tokens
from .mask_summary import MaskSummary


def compute_block_scores(
    query: Tensor,
    key: Tensor,
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
        key: [B, Hkv, Skv, D].
        geometry: The block grid.
        granularity: How tokens and heads are pooled.
        scale: Factor on the logits, as in SDPA.
        mask: Summary of the call's ``attn_mask``, made with the same granularity.

    Returns:
        [B, Hs, Nq, Nk] with Hs = Hq / granularity.heads, float32 (float64 for float64 inputs).
        A row sums to 1, to 0 where its queries see nothing, and is NaN where a query or key that
        takes part in it is not finite.
    """
    size = geometry.block_size
    batch, kv_heads = key.shape[:2]
    query_valid = mask.query_valid.expand(batch, -1) if mask is not None else None
    key_valid = mask.key_valid.expand(batch, -1) if mask is not None else None
    q_groups, kv_groups = geometry.num_groups(granularity.q, granularity.k)
    composite_q, q_counts = pool_tokens(query, granularity.q, groups=q_groups, valid=query_valid)
    composite_k, k_counts = pool_tokens(key, granularity.k, groups=kv_groups, valid=key_valid)
    composite_q = pool_heads(composite_q, kv_heads, granularity.heads)

    # One product per key head; keys are never repeated for the heads of their group.
    group, rows, head_dim = composite_q.shape[2:]
    stacked = composite_q.reshape(batch, kv_heads, group * rows, head_dim) * scale
    columns = composite_k.shape[2]
    logits = (stacked @ composite_k.transpose(-1, -2)).view(batch, kv_heads, group, rows, columns)
    bias = _cell_bias(k_counts, granularity, mask, kv_heads).to(logits.dtype)
    visible = geometry.visible(granularity.q, granularity.k, query.device)
    # After the addition: what is hidden stays hidden, a NaN too.
    logits = (logits + bias).masked_fill(~visible | (bias == -math.inf), -math.inf)

    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -math.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    row_weight = q_counts[:, None, None, :, None] * (total != 0)
    tiles = (
        geometry.num_q_blocks,
        size // granularity.q,
        geometry.num_kv_blocks,
        size // granularity.k,
    )
    mass = weights.view(batch, kv_heads, group, *tiles).sum(-1)
    row_weight = row_weight.view(batch, kv_heads, group, *tiles[:2], 1)
    share = row_weight / row_weight.sum(-2, keepdim=True).clamp_min(1)
    total = total.masked_fill(total == 0, 1.0).view(batch, kv_heads, group, *tiles[:2], 1)
    return (mass * (share / total)).sum(-2).flatten(1, 2)


def _cell_bias(
    k_counts: Tensor, granularity: Pooled, mask: MaskSummary | None, kv_heads: int
) -> Tensor:
    """What is added to composite logits, broadcastable to [B, Hkv, G / heads, Cq, Ck]."""
    exists = (k_counts / granularity.k).log()[:, None, None, None, :]
    if mask is None:
        return exists
    bias = mask.cell_bias
    if bias.shape[1] == 1:
        return exists + bias[:, :, None]
    per_head = bias.unflatten(1, (kv_heads, -1, granularity.heads))
    return exists + per_head.logsumexp(3) - math.log(granularity.heads)


def default_scale(head_dim: int) -> float:
    """SDPA's default factor on the logits."""
    return 1.0 / math.sqrt(head_dim)


def supports_dtype(dtype: torch.dtype) -> bool:
    """Whether scores can be computed from tokens of ``dtype``."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
