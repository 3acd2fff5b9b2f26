"""Selection rules and the blocks that every selection keeps.

Symbols: B batch, H heads, Nq/Nk query and key blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import BlockGeometry
from .mask_summary import MaskSummary
from .validation import validate_fraction, validate_int


class SelectionRule(ABC):
    """Which blocks of a row are kept, given their scores and those kept in any case."""

    @abstractmethod
    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """Chooses blocks row by row.

        Args:
            scores: float [B, H, Nq, Nk], shares of a row's attention mass.
            forced: bool, broadcastable to scores: kept whatever their score.
            visible: bool, broadcastable to scores: the blocks that may be kept.

        Returns:
            bool [B, H, Nq, Nk]: ``forced`` and what the rule adds, within ``visible``.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class TopP(SelectionRule):
    """Keeps the highest blocks until their mass reaches ``top_p``; forced mass counts first.

    Attributes:
        top_p: Share of a row's estimated mass in (0, 1]; 1.0 keeps every visible block.
    """

    top_p: float

    def __post_init__(self) -> None:
        validate_fraction(self.top_p, "top_p")

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; ties go to the lower block index."""
        if self.top_p == 1.0:
            # An estimate of zero is no proof of zero: all means all.
            return visible.expand_as(scores)
        return _until_mass(scores, forced, visible, self.top_p)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK(SelectionRule):
    """Keeps ``top_k`` blocks per row, forced ones counted first; more only where more are forced.

    Attributes:
        top_k: Blocks per row, at least 1.
    """

    top_k: int

    def __post_init__(self) -> None:
        validate_int(self.top_k, "top_k", minimum=1)

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; ties go to the lower block index."""
        values, order = _descending(scores, forced, visible)
        left = self.top_k - (forced & visible).sum(-1, keepdim=True)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        return _scatter(order, (rank < left) & (values >= 0)) | (forced & visible)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold(SelectionRule):
    """Keeps the blocks whose estimated share of the row's mass reaches ``threshold``.

    Attributes:
        threshold: Share of the mass in (0, 1].
        threshold_blocks: Visible blocks of a row for which it is stated, see `scale_threshold`.
    """

    threshold: float
    threshold_blocks: int | None = None

    def __post_init__(self) -> None:
        validate_fraction(self.threshold, "threshold")
        _validate_threshold_blocks(self.threshold_blocks)

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; a row that would keep nothing keeps its highest blocks."""
        least = scale_threshold(self.threshold, self.threshold_blocks, visible)
        return _or_highest((forced | (scores >= least)) & visible, scores, visible)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopPOrThreshold(SelectionRule):
    """Keeps what `TopP` or `Threshold` keeps.

    A threshold alone spends its blocks where they hold most, and starves rows that attend to many
    blocks a little; ``top_p`` is the mass that these keep at least.

    Attributes:
        top_p: Share of a row's estimated mass in (0, 1]; 1.0 keeps every visible block.
        threshold: Share of the mass in (0, 1] from which a block is kept in any case.
        threshold_blocks: Visible blocks of a row for which it is stated, see `scale_threshold`.
    """

    top_p: float
    threshold: float
    threshold_blocks: int | None = None

    def __post_init__(self) -> None:
        validate_fraction(self.top_p, "top_p")
        validate_fraction(self.threshold, "threshold")
        _validate_threshold_blocks(self.threshold_blocks)

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; ties at the end of ``top_p`` go to the lower block index."""
        mass = TopP(top_p=self.top_p).select(scores, forced, visible)
        least = scale_threshold(self.threshold, self.threshold_blocks, visible)
        return mass | ((scores >= least) & visible)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTopP(SelectionRule):
    """`TopP` with a share for every head (XAttention, section 2.3).

    Attributes:
        top_p: Shares in (0, 1], one for each head of the scores.
    """

    top_p: tuple[float, ...]

    def __post_init__(self) -> None:
        for i, share in enumerate(self.top_p):
            validate_fraction(share, f"top_p[{i}]")

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; ties go to the lower block index.

        Raises:
            ValueError: More or fewer shares than heads.
        """
        shares = _per_head(self.top_p, "top_p", scores)
        kept = _until_mass(scores, forced, visible, shares)
        return kept | ((shares == 1.0) & visible)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadThreshold(SelectionRule):
    """`Threshold` with a share for every head; with ``top_p``, what `TopP` keeps as well.

    Attributes:
        thresholds: Shares of the mass in [0, 1], one for each head of the scores; 0 keeps every
            visible block.
        top_p: Share of a row's estimated mass in (0, 1]; ``None`` where only thresholds count.
        threshold_blocks: Visible blocks of a row for which they are stated, see `scale_threshold`.
    """

    thresholds: tuple[float, ...]
    top_p: float | None = None
    threshold_blocks: int | None = None

    def __post_init__(self) -> None:
        for i, share in enumerate(self.thresholds):
            if isinstance(share, bool) or share != 0:
                validate_fraction(share, f"head_thresholds[{i}]")
        if self.top_p is not None:
            validate_fraction(self.top_p, "top_p")
        _validate_threshold_blocks(self.threshold_blocks)

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`.

        Raises:
            ValueError: More or fewer thresholds than heads.
        """
        shares = _per_head(self.thresholds, "head_thresholds", scores)
        least = scale_threshold(shares, self.threshold_blocks, visible)
        kept = (forced | (scores >= least)) & visible
        if self.top_p is None:
            return _or_highest(kept, scores, visible)
        return kept | TopP(top_p=self.top_p).select(scores, forced, visible)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMax(SelectionRule):
    """Keeps the blocks whose score reaches a share of the row's highest (FlashPrefill).

    Attributes:
        alpha: Share of the row's highest score in (0, 1].
    """

    alpha: float

    def __post_init__(self) -> None:
        validate_fraction(self.alpha, "alpha")

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; a score of zero is kept only where nothing else would be."""
        least = self.alpha * scores.masked_fill(~visible, 0.0).amax(-1, keepdim=True)
        kept = (forced | ((scores >= least) & (scores > 0))) & visible
        return _or_highest(kept, scores, visible)


class HasForcedBlocks(Protocol):
    """What has the fields of `ForcedBlocks`."""

    @property
    def sink_blocks(self) -> int:
        """See `ForcedBlocks`."""

    @property
    def local_blocks(self) -> int:
        """See `ForcedBlocks`."""

    @property
    def last_query_blocks(self) -> int:
        """See `ForcedBlocks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcedBlocks:
    """Blocks that are kept whatever the scores say.

    Attributes:
        sink_blocks: First visible key blocks of every row, at least 0.
        local_blocks: The diagonal block and those before it (on both sides where nothing is
            causal and ``q_len == kv_len``), at least 1.
        last_query_blocks: Last query blocks that keep everything, at least 0.
    """

    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 1

    def __post_init__(self) -> None:
        validate_int(self.sink_blocks, "sink_blocks", minimum=0)
        validate_int(self.local_blocks, "local_blocks", minimum=1)
        validate_int(self.last_query_blocks, "last_query_blocks", minimum=0)

    @classmethod
    def of(cls, settings: HasForcedBlocks) -> ForcedBlocks:
        """Those that a selector, or the kernels' settings, have as fields of these names."""
        return cls(
            sink_blocks=settings.sink_blocks,
            local_blocks=settings.local_blocks,
            last_query_blocks=settings.last_query_blocks,
        )

    def of_part(self, geometry: BlockGeometry) -> ForcedBlocks:
        """Those of a part of a call, for what does not know of the rows after it."""
        left = max(0, self.last_query_blocks - geometry.q_blocks_after)
        return replace(self, last_query_blocks=left)

    def locate(
        self, geometry: BlockGeometry, device: torch.device, mask: MaskSummary | None = None
    ) -> Tensor:
        """The forced blocks: bool [1 or Bm, 1, Nq, Nk], not yet restricted to visible ones.

        With a mask, sinks are counted from the first key block that is not all padding and last
        query blocks from the last one that holds a query: left and right padding move both.
        """
        local = geometry.local_blocks(self.local_blocks, device)[None, None]
        q_blocks, kv_blocks = geometry.num_q_blocks, geometry.num_kv_blocks
        key_valid = mask.key_valid if mask else None
        keys = valid_blocks(key_valid, kv_blocks, geometry.block_size, device)
        sink = keys & (keys.cumsum(-1) <= self.sink_blocks)
        query_valid = mask.query_valid if mask else None
        rows = valid_blocks(query_valid, q_blocks, geometry.block_size, device)
        from_end = rows.flip(-1).cumsum(-1).flip(-1)
        last = rows & (from_end <= self.last_query_blocks - geometry.q_blocks_after)
        return local | sink[:, None, None, :] | last[:, None, :, None]


def select_blocks(
    scores: Tensor,
    *,
    rule: SelectionRule,
    forced_blocks: ForcedBlocks,
    geometry: BlockGeometry,
    mask: MaskSummary | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies a rule to block scores, and keeps the forced blocks.

    Rows whose scores are not finite keep every visible block, so that a NaN or an infinity in
    queries or keys reaches the output as it does in dense attention. Under a mask, a query block
    of which some row would keep no key that it sees keeps every visible block.

    Args:
        scores: float [B, H, Nq, Nk]; NaN where a row cannot be judged.
        rule: Which blocks a row keeps.
        forced_blocks: Which blocks are kept in any case.
        geometry: The block grid.
        mask: Summary of the call's ``attn_mask``.

    Returns:
        keep, bool [B, H, Nq, Nk], and the visible blocks, bool [1 or Bm, 1 or Hm, Nq, Nk].
    """
    visible = geometry.visible_blocks(scores.device)[None, None]
    rule_visible = visible
    if mask is not None:
        visible = visible & mask.visible_blocks
        rule_visible = _group_heads(visible, scores.shape[1])
    forced = forced_blocks.locate(geometry, scores.device, mask) & rule_visible
    unjudged = scores.isnan().any(-1, keepdim=True)
    judged = scores.masked_fill(unjudged, 0.0)
    keep = rule.select(judged, forced, rule_visible) | (unjudged & rule_visible)
    if mask is not None and mask.row_blocks is not None and mask.row_sees is not None:
        uncovered = _uncovered_rows(keep, mask.row_blocks, mask.row_sees, geometry)
        keep = keep | (uncovered & rule_visible)
    return keep, visible


def per_query_head(keep: Tensor, visible: Tensor, q_heads: int) -> Tensor:
    """Kept blocks as FlexAttention takes them, for 1 or Hq heads and nothing between.

    Args:
        keep: bool [B, Hs, Nq, Nk]; Hs divides Hq.
        visible: bool [1 or B, 1 or Hq, Nq, Nk].
        q_heads: Hq.

    Returns:
        bool [B, 1 or Hq, Nq, Nk].
    """
    if keep.shape[1] == q_heads or max(keep.shape[1], visible.shape[1]) == 1:
        return keep
    return keep.repeat_interleave(q_heads // keep.shape[1], dim=1) & visible


def _uncovered_rows(
    keep: Tensor, row_blocks: Tensor, row_sees: Tensor, geometry: BlockGeometry
) -> Tensor:
    """Query blocks with a row that sees keys but none of the kept ones: bool [B, H, Nq, 1]."""
    tiles = (geometry.num_q_blocks, geometry.block_size)
    rows = _split_group(row_blocks, keep.shape[1]).unflatten(-2, tiles).float()
    sees = _split_group(row_sees, keep.shape[1]).unflatten(-1, tiles)
    kept = torch.einsum("bhgirj,bhij->bhgir", rows, keep.to(rows.dtype))
    return ((kept == 0) & sees).any(-1).any(2)[..., None]


def _split_group(per_head: Tensor, heads: int) -> Tensor:
    """[Bm, Hm, ...] as [Bm, 1 or heads, Hm / heads, ...]: heads that share a selection apart."""
    if per_head.shape[1] == 1:
        return per_head[:, :, None]
    return per_head.unflatten(1, (heads, -1))


def _group_heads(visible: Tensor, heads: int) -> Tensor:
    return _split_group(visible, heads).any(2)


def valid_blocks(valid: Tensor | None, blocks: int, size: int, device: torch.device) -> Tensor:
    """Blocks that hold a valid token: bool [..., blocks] of [..., tokens], or all of them."""
    if valid is None:
        return torch.ones((1, blocks), dtype=torch.bool, device=device)
    padded = F.pad(valid, (0, blocks * size - valid.shape[-1]))
    return padded.unflatten(-1, (blocks, size)).any(-1)


def _per_head(shares: tuple[float, ...], name: str, scores: Tensor) -> Tensor:
    """One share for each head of the scores: [H, 1, 1]."""
    validate_per_head(shares, name, scores.shape[1])
    # Filled on the device: a tensor made from a tuple would wait for the copy.
    return torch.cat([scores.new_full((1, 1, 1), share) for share in shares])


def validate_per_head(shares: tuple[float, ...], name: str, heads: int) -> None:
    """Raises ValueError unless there is one share for each head."""
    if len(shares) != heads:
        raise ValueError(
            f"{name} must hold one share for each of {heads} heads, got {len(shares)}; "
            "where ranks hold some of the heads, give each the shares of its own"
        )


def scale_threshold(
    threshold: float | Tensor, threshold_blocks: int | None, visible: Tensor
) -> float | Tensor:
    """The threshold of every row, by the square root of the blocks that it sees.

    A row of n visible blocks has ``threshold * sqrt(threshold_blocks / n)``, between one threshold
    for all rows and an even share, 1 / n: the last spares most at the end of a prompt and leaves
    the least to its beginning.

    Args:
        threshold: Share of the mass, or one for each head, [H, 1, 1].
        threshold_blocks: Blocks of a row for which it is stated; ``None`` for all rows alike.
        visible: bool [B or 1, H or 1, Nq, Nk].

    Returns:
        What a score must reach, broadcastable to scores.
    """
    if threshold_blocks is None:
        return threshold
    blocks = visible.sum(-1, keepdim=True).clamp_min(1)
    return threshold * (threshold_blocks / blocks).sqrt()


def _validate_threshold_blocks(value: int | None) -> None:
    if value is not None:
        validate_int(value, "threshold_blocks", minimum=1)


def _or_highest(kept: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """What is kept, and in rows without any the visible blocks of the highest score."""
    highest = scores.masked_fill(~visible, -1.0).amax(-1, keepdim=True)
    return kept | (visible & (scores >= highest) & ~kept.any(-1, keepdim=True))


def _until_mass(scores: Tensor, forced: Tensor, visible: Tensor, share: Tensor | float) -> Tensor:
    """Forced blocks, then the highest until the mass of what is kept reaches ``share``."""
    values, order = _descending(scores, forced, visible)
    forced_mass = (scores * forced).sum(-1, keepdim=True)
    before = forced_mass + F.pad(values.clamp_min(0).cumsum(-1)[..., :-1], (1, 0))
    return _scatter(order, (before < share) & (values >= 0)) | (forced & visible)


def _descending(scores: Tensor, forced: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the blocks a rule may choose, highest first; -1 for those it may not."""
    candidates = torch.where(visible & ~forced, scores, -1.0)
    return candidates.sort(dim=-1, descending=True, stable=True)


def _scatter(order: Tensor, keep_sorted: Tensor) -> Tensor:
    return torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted)
