"""FlashPrefill: every query against pooled keys, and a threshold relative to the row's maximum.

A reconstruction from its description: keys are averaged by block, no scores are sorted, and the
last query blocks are dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...granularity import CompositeKeys
from ...mask_summary import summarize
from ...scoring import compute_pooled_key_scores
from ...selection import RowMax
from ...selection_cost import SelectionCost
from ...validation import validate_block_size
from ..base import ForcesBlocks, Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashPrefill(ForcesBlocks, Selector):
    """Blocks that reach ``alpha`` of the highest score of their row of blocks.

    Attributes:
        block_size: Tokens per block, and keys per pooled key; a power of two of at least 16.
        alpha: Share of the row's highest score in (0, 1]; its authors use .1 to .18.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    alpha: float = 0.1
    sink_blocks: int = 2
    local_blocks: int = 4
    last_query_blocks: int = 2

    row_independent = True

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        _ = self.rule, self.forced_blocks
        Selector.__post_init__(self)

    @property
    def rule(self) -> RowMax:
        """The threshold relative to the row's maximum."""
        return RowMax(alpha=self.alpha)

    @property
    def cost(self) -> SelectionCost:
        """Every query against pooled keys; the share kept beside forced blocks is a guess."""
        return SelectionCost(
            c_q=1,
            c_k=self.block_size,
            row_blocks=self.sink_blocks + self.local_blocks,
            last_query_blocks=self.last_query_blocks,
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
        mask = summarize(attn_mask, geometry, c_q=1, c_k=self.block_size, device=query.device)
        scores = compute_pooled_key_scores(query, key, geometry=geometry, scale=scale, mask=mask)
        return self.select_by(
            self.rule, scores, geometry=geometry, q_heads=query.shape[1], mask=mask
        )

    @property
    def keys_per_composite(self) -> int:
        """See `Selector.keys_per_composite`: a block's mean key is all that it needs."""
        return self.block_size

    def select_from_composites(
        self, query: Tensor, keys: CompositeKeys, *, geometry: BlockGeometry, scale: float
    ) -> BlockSelection:
        """See `Selector.select_from_composites`."""
        scores = compute_pooled_key_scores(query, keys, geometry=geometry, scale=scale)
        return self.select_by(self.rule, scores, geometry=geometry, q_heads=query.shape[1])
