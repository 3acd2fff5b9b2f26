"""FlexPrefill: heads judged by their last queries, blocks by cumulative mass (arXiv 2502.20766)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...granularity import Pooled, pool_tokens
from ...scoring import compute_block_scores
from ...selection import SelectionRule, TopP, select_blocks
from ...selection_cost import LENGTH_POWER, SelectionCost, top_p_share
from ...validation import validate_block_size, validate_fraction, validate_int
from ..base import ForcesBlocks, RenamesFields, Selector
from .last_queries import (
    attend_last,
    blocks_on_diagonals,
    keep_highest,
    last_positions,
    select_lines,
    sum_blocks,
    sum_columns,
    sum_diagonals,
    validate_causal_only,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexPrefill(RenamesFields, ForcesBlocks, Selector):
    """Query-aware or vertical-slash blocks, whichever the last queries of a head call for.

    The last ``block_size`` queries attend to every key. Where pooled tokens would have told as
    much (Jensen-Shannon distance below ``tau``; section 3, sparse pattern search), the head is
    query-aware: top-p over its whole map of pooled blocks (query-aware index search). Else the
    columns and diagonals of these queries that hold ``top_p`` of their mass are kept
    (vertical-slash index search). Causal calls without a mask only; up to
    ``max(2 * block_size, min_budget)`` keys everything is kept.

    Beyond the paper: blocks of `ForcedBlocks` are kept, their mass counted first, and a pooled
    block that the keys do not fill weighs less.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        top_p: Share of the mass to keep, in (0, 1]; 1.0 keeps all. The paper's gamma.
        tau: Distance, natural logarithms, below which a head is query-aware, in [0, 1]; 0 for
            never, 1 for always.
        min_budget: Tokens that columns, and diagonals, hold at least.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    top_p: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 1

    renamed_fields = MappingProxyType({"gamma": "top_p"})

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        validate_fraction(self.top_p, "top_p")
        if not isinstance(self.tau, (int, float)) or isinstance(self.tau, bool):
            raise TypeError(
                f"tau must be a number, got {self.tau!r} of type {type(self.tau).__name__}"
            )
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")
        validate_int(self.min_budget, "min_budget", minimum=0)
        _ = self.forced_blocks
        Selector.__post_init__(self)

    @property
    def cost(self) -> SelectionCost:
        """Whole blocks are pooled; the share kept is taken to be that of UniSparse's top-p."""
        forced = self.sink_blocks + self.local_blocks
        return SelectionCost(
            c_q=self.block_size,
            c_k=self.block_size,
            row_blocks=max(forced, 2 * self._budget_blocks()),
            last_query_blocks=self.last_query_blocks,
            share=top_p_share(self.top_p),
            share_power=LENGTH_POWER,
        )

    def _budget_blocks(self) -> int:
        return -(-self.min_budget // self.block_size)

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """See `Selector.supports`: the last queries must stand for all."""
        return causal and not masked

    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        """See `Selector.compute_selection`."""
        validate_causal_only("FlexPrefill", geometry, attn_mask)
        size = self.block_size
        shares = attend_last(query, key, count=size, geometry=geometry, scale=scale)
        columns, diagonals = sum_columns(shares), sum_diagonals(shares, geometry)
        lines = self._choose(columns)[:, :, None, :] | blocks_on_diagonals(
            self._choose(diagonals), geometry, size
        )
        along_lines, visible = select_lines(
            lines, query, columns, forced_blocks=self.forced_blocks, geometry=geometry
        )
        scores = compute_block_scores(
            query, key, geometry=geometry, granularity=Pooled(q=size, k=size), scale=scale
        )
        in_map, _ = select_blocks(
            scores,
            rule=_MapTopP(top_p=self.top_p),
            forced_blocks=self.forced_blocks,
            geometry=geometry,
        )
        pooled = pooled_last(query, key, geometry=geometry, scale=scale)
        # False for a NaN: such a head is kept whole as one of lines.
        query_aware = distance(pooled, sum_blocks(columns, size)) < self.tau
        keep = torch.where(query_aware[..., None, None], in_map, along_lines)
        few = torch.full((), geometry.kv_len, device=query.device) <= max(2 * size, self.min_budget)
        return BlockSelection(keep=keep | (few & visible), visible=visible, geometry=geometry)

    def _choose(self, mass: Tensor) -> Tensor:
        """Blocks of columns or of diagonals: [B, Hq, N] to bool [B, Hq, blocks].

        The blocks of most mass, and the first. Their number follows from the tokens: one more than
        the whole blocks that those within ``top_p`` fill, and as many as ``min_budget`` asks for.
        """
        ranked = mass.sort(dim=-1, descending=True).values.cumsum(-1)
        tokens = (ranked <= (self.top_p if self.top_p < 1 else math.inf)).sum(-1, keepdim=True)
        counts = (tokens // self.block_size + 1).clamp(min=self._budget_blocks())
        blocks = sum_blocks(mass, self.block_size)
        first = torch.arange(blocks.shape[-1], device=mass.device) == 0
        return keep_highest(blocks, counts) | first


@dataclass(frozen=True, kw_only=True, slots=True)
class _MapTopP(SelectionRule):
    """Top-p over all rows of a head at once; ties to the lower row, then column."""

    top_p: float

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; rows whose scores are all zero do not count."""
        flat, forced, visible = (
            part.expand_as(scores).flatten(-2)[..., None, :] for part in (scores, forced, visible)
        )
        shares = flat / flat.sum(-1, keepdim=True).clamp_min(1e-9)
        kept = TopP(top_p=self.top_p).select(shares, forced, visible)
        return kept[..., 0, :].unflatten(-1, scores.shape[-2:])


def pooled_last(query: Tensor, key: Tensor, *, geometry: BlockGeometry, scale: float) -> Tensor:
    """Attention of the mean of the last ``block_size`` queries over the means of key blocks.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: The block grid, causal.
        scale: Factor on the logits.

    Returns:
        [B, Hq, Nk], in all 1 per head; a partial block weighs by the keys that it has.
    """
    size, blocks = geometry.block_size, geometry.num_kv_blocks
    means, counts = pool_tokens(key, size, groups=blocks)
    row = last_positions(size, geometry, query.device)
    exists = (row >= 0)[:, None]
    last = query[:, :, row.clamp(min=0)].to(means.dtype).masked_fill(~exists, 0.0)
    mean = last.sum(-2) / exists.sum()
    grouped = mean.unflatten(1, (key.shape[1], -1)) * scale
    logits = (grouped @ means.transpose(-1, -2)).flatten(1, 2) + (counts / size).log()[:, None]
    visible = geometry.visible(size, size, query.device)[-1]
    return logits.masked_fill(~visible, -math.inf).softmax(-1)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of [..., N] and [..., N]: [...]."""
    middle = (one + other) / 2
    terms = [torch.xlogy(part, part) - torch.xlogy(part, middle) for part in (one, other)]
    return ((terms[0] + terms[1]).sum(-1) / 2).clamp_min(0).sqrt()
