"""Estimates of the mass of every block, as small functions of a part of a call.

Each returns the masses of rows, [Hkv, G, Nq, n, Nk] with rows that sum to 1: of sampled rows,
of all of them, or of means of some. `combine` makes scores of one or several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .parts import Part


def exact_rows(part: Part, count: int) -> Tensor:
    """``count`` rows of every block against every key; with all of them the true masses."""
    found = part.exact_logits(part.sampled(count)).softmax(-1)
    return _by_blocks(found, part, part.tile.keys)


def pooled(part: Part, rows: int = 16) -> Tensor:
    """Means of ``rows`` queries against the mean key of each block, as the default has them."""
    heads, group, count, width = part.query.shape
    means = part.query.float().view(heads, group, count // rows, rows, width).mean(3)
    keys = part.key.float().view(heads, part.key_blocks, part.tile.keys, width).mean(2)
    logits = part.logits(means, keys)
    last = part.positions.unflatten(2, (count // rows, rows)).amax(-1)
    start = torch.arange(part.key_blocks, device=part.key.device) * part.tile.keys
    logits.masked_fill_(start > last[..., None], -math.inf)
    return _by_blocks(logits.softmax(-1), part, 1)


def moments(part: Part, *, rows: int, groups: int = 1, variance: bool = True) -> Tensor:
    """``rows`` of every block against mean and variance of ``groups`` of its keys.

    The mean of exp(q k) over normal keys with mean m and variances v is exp(q m + q^2 v / 2).
    """
    heads, _, _, width = part.query.shape
    size = part.tile.keys // groups
    sampled = part.sampled(rows)
    queries = part.query[:, :, sampled]
    split = part.key.float().view(heads, -1, size, width)
    kind = part.query.dtype
    logits = part.logits(queries, split.mean(2).to(kind))
    if variance:
        spread = split.var(2, correction=0) * (part.scale / 2)
        logits += part.logits(queries.float().square().to(kind), spread.to(kind))
    logits += _log_counts(part, sampled, size)
    return _by_blocks(logits.softmax(-1), part, groups)


def sampled_keys(part: Part, count: int, rows: int) -> Tensor:
    """``rows`` of every block against ``count`` keys of each, evenly spread over the block."""
    step = part.tile.keys // count
    places = torch.arange(step // 2, part.key.shape[1], step, device=part.key.device)
    sampled = part.sampled(rows)
    logits = part.logits(part.query[:, :, sampled], part.key[:, places])
    logits.masked_fill_(places > part.positions[:, :, sampled, None], -math.inf)
    # A row at the beginning may see none of them.
    logits[..., 0].masked_fill_(logits[..., 0] == -math.inf, 0.0)
    return _by_blocks(logits.softmax(-1), part, count)


def refine(part: Part, first: Tensor, rows: int, least: Tensor) -> tuple[Tensor, float]:
    """``rows`` exact rows where a first score reaches ``least``; elsewhere that score.

    A row's mass outside of them is taken to be what the first score gives it.

    Args:
        part: The rows.
        first: Scores [Hkv, G, Nq, Nk] whose rows sum to 1.
        rows: Of every block.
        least: Broadcastable to ``first``.

    Returns:
        Masses as the other estimates, and the share of visible blocks that were refined.
    """
    chosen = (first >= least) & part.visible
    chosen[..., 0] = True
    logits = part.exact_logits(part.sampled(rows)).unflatten(2, (part.row_blocks, rows))
    hidden = ~chosen.repeat_interleave(part.tile.keys, -1)[:, :, :, None]
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    inside = weights.unflatten(-1, (part.key_blocks, part.tile.keys)).sum(-1)
    outside = first.masked_fill(chosen, 0.0)[:, :, :, None]
    found = inside * (1 - outside.sum(-1, keepdim=True)) + outside
    heads, group = part.query.shape[:2]
    share = chosen.sum() / (heads * group * part.visible.sum())
    return found, float(share)


def combine(masses: Sequence[Tensor], power: int = 1) -> Tensor:
    """Scores [Hkv, G, Nq, Nk]: the power mean over rows, then over estimates; rows sum to 1."""
    found = torch.stack([mass.pow(power).mean(3) for mass in masses]).mean(0)
    if power == 1:
        return found
    roots = found.pow(1 / power)
    return roots / roots.sum(-1, keepdim=True)


def _log_counts(part: Part, rows: Tensor, size: int) -> Tensor:
    """Log of the keys of each group that a row sees: [Hkv or 1, G or 1, n, E / size]."""
    start = torch.arange(0, part.key.shape[1], size, device=part.key.device)
    return (part.positions[:, :, rows, None] + 1 - start).clamp(0, size).float().log()


def _by_blocks(shares: Tensor, part: Part, columns: int) -> Tensor:
    """[Hkv, G, Nq * n, Nk * columns] summed over the columns of blocks: [Hkv, G, Nq, n, Nk]."""
    summed = shares.unflatten(-1, (part.key_blocks, columns)).sum(-1)
    return summed.unflatten(2, (part.row_blocks, -1))
