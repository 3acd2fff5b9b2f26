"""Oracle: top-p over the true mass of blocks, to judge other selectors by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...granularity import Sampled, mark_not_finite
from ...mask_summary import summarize
from ...scoring import compute_sampled_scores
from ...selection import TopP
from ...selection_cost import LENGTH_POWER, SelectionCost, top_p_share
from ...validation import validate_block_size
from ..base import ForcesBlocks, Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle(ForcesBlocks, Selector):
    """Top-p blocks by the mass that dense attention gives them; for judging, never for speed.

    Scoring is dense attention without the values, and holds all Hq * Sq * Skv weights at once.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        top_p: Share of a query block's mean attention mass to keep, in (0, 1].
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    top_p: float = 0.95
    sink_blocks: int = 0
    local_blocks: int = 1
    last_query_blocks: int = 0

    row_independent = True

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        _ = self.rule, self.forced_blocks
        Selector.__post_init__(self)

    @property
    def rule(self) -> TopP:
        """Top-p."""
        return TopP(top_p=self.top_p)

    @property
    def cost(self) -> SelectionCost:
        """Every query against every key."""
        return SelectionCost(
            c_q=1,
            c_k=1,
            row_blocks=self.sink_blocks + self.local_blocks,
            last_query_blocks=self.last_query_blocks,
            share=top_p_share(self.top_p),
            share_power=LENGTH_POWER,
        )

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
        size = geometry.block_size
        mask = summarize(attn_mask, geometry, c_q=size, c_k=size, device=query.device)
        scores = compute_sampled_scores(
            mark_not_finite(query),
            mark_not_finite(key),
            geometry=geometry,
            granularity=Sampled(queries=size),
            scale=scale,
            attn_mask=attn_mask,
        )
        return self.select_by(
            self.rule, scores, geometry=geometry, q_heads=query.shape[1], mask=mask
        )
