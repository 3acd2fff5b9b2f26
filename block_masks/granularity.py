"""Composite tokens: queries and keys averaged along the sequence and across heads of a GQA group.

Symbols: B batch, Hq/Hkv heads, G = Hq/Hkv, S tokens, D head_dim, C composite tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import validate_int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """Average pooling of queries and keys into composite tokens (UniSparse, section 3).

    Attributes:
        q: Query rows per composite query; divides the block size.
        k: Keys per composite key; divides the block size.
        heads: Consecutive query heads of one GQA group per composite head; divides the group.
    """

    q: int = 8
    k: int = 8
    heads: int = 1

    def __post_init__(self) -> None:
        for name in ("q", "k", "heads"):
            validate_int(getattr(self, name), name, minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Single query rows that meet every key exactly: of every group of rows, the last.

    What pooled keys cannot see, they do: a mean of logits hides the one key that stands out.

    Attributes:
        queries: Sampled rows per block; divides the block size.
        heads: Consecutive query heads of one GQA group that are averaged; divides the group.
    """

    queries: int = 4
    heads: int = 1

    def __post_init__(self) -> None:
        for name in ("queries", "heads"):
            validate_int(getattr(self, name), name, minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompositeKeys:
    """Keys that were pooled already, elsewhere perhaps.

    Attributes:
        tokens: [B, Hkv, C, D], as `pool_tokens` makes them.
        counts: Keys of each, float [1, C].
    """

    tokens: Tensor
    counts: Tensor


def pool_tokens(
    tokens: Tensor, group: int, *, groups: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Averages every ``group`` consecutive tokens; a partial group divides by its true count.

    Args:
        tokens: [B, H, S, D], any floating dtype.
        group: Tokens per composite token.
        groups: Composite tokens in the result, C >= ceil(S / group); those after S are empty.
        valid: bool [B, S], the tokens that take part; ``None`` for all.

    Returns:
        The composites [B, H, C, D] in float32 (float64 for float64 tokens), zero where empty and
        NaN where a token that takes part is not finite; and their token counts, float
        [1 or B, C].
    """
    batch, heads, length, head_dim = tokens.shape
    accumulate = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    padding = groups * group - length
    if valid is None:
        start = torch.arange(groups, device=tokens.device) * group
        counts = (length - start).clamp(0, group).to(accumulate)[None]
    else:
        tokens = tokens.masked_fill(~valid[:, None, :, None], 0.0)
        whole = F.pad(valid, (0, padding)).view(batch, groups, group)
        counts = whole.sum(-1).to(accumulate)
    if not isinstance(padding, int) or padding:
        tokens = F.pad(tokens, (0, 0, 0, padding))
    sums = tokens.reshape(batch, heads, groups, group, head_dim).sum(3, dtype=accumulate)
    means = sums / counts.clamp_min(1)[:, None, :, None]
    return mark_not_finite(means), counts


def mark_not_finite(tokens: Tensor) -> Tensor:
    """Infinities as NaN: one could vanish in a softmax, a NaN never does."""
    return torch.where(tokens.isfinite(), tokens, float("nan"))


def split_tokens(
    tokens: Tensor, group: int, *, groups: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Groups of ``group`` consecutive tokens; one that is missing counts as its group's mean.

    Args:
        tokens: [B, H, S, D], any floating dtype.
        group: Tokens per group.
        groups: Groups in the result, C >= ceil(S / group); those after S are empty.
        valid: bool [B, S], the tokens that take part; ``None`` for all.

    Returns:
        [B, H, C, group, D] in float32 (float64 for float64 tokens), zero in empty groups and NaN
        in groups where a token that takes part is not finite; and `pool_tokens`' counts.
    """
    means, counts = pool_tokens(tokens, group, groups=groups, valid=valid)
    length = tokens.shape[2]
    exists = torch.arange(groups * group, device=tokens.device)[None] < length
    if valid is not None:
        exists = F.pad(valid, (0, groups * group - length))
    parts = F.pad(tokens.to(means.dtype), (0, 0, 0, groups * group - length))
    means = means[:, :, :, None]
    exists = exists.view(-1, 1, groups, group, 1) & means.isfinite()
    return torch.where(exists, parts.unflatten(2, (groups, group)), means), counts


def pool_heads(composites: Tensor, kv_heads: int, heads: int) -> Tensor:
    """Averages every ``heads`` consecutive query heads of a GQA group.

    Args:
        composites: [B, Hq, C, D].
        kv_heads: Hkv; divides Hq.
        heads: Heads per composite head; divides G = Hq / Hkv.

    Returns:
        [B, Hkv, G / heads, C, D].

    Raises:
        ValueError: ``heads`` does not divide the group.
    """
    batch, q_heads, length, head_dim = composites.shape
    validate_merged_heads(q_heads, kv_heads, heads)
    split = composites.reshape(
        batch, kv_heads, q_heads // kv_heads // heads, heads, length, head_dim
    )
    return split.mean(3)


def validate_merged_heads(q_heads: int, kv_heads: int, heads: int) -> None:
    """Raises ValueError unless ``heads`` divides the GQA group of these heads."""
    group = q_heads // kv_heads
    if group % heads:
        raise ValueError(
            f"c_h must divide the GQA group of {group} heads ({q_heads} query heads over "
            f"{kv_heads} key heads), got {heads}; use 1 or {group}"
        )
