"""Which blocks: composite tokens, scores, selection, BlockMask. Knows torch, nothing of graphs."""

from .block_mask import causal_mask_mod, create_block_mask, selection_mask_mod, to_block_mask
from .block_selection import BlockSelection
from .geometry import BlockGeometry
from .granularity import Pooled, pool_heads, pool_tokens
from .mask_program import MaskProgram
from .mask_summary import MaskSummary, summarize_mask
from .patch_order import PatchOrder
from .scoring import compute_block_scores
from .selection import Guards, SelectionRule, TopK, TopP, select_blocks
from .selection_cost import SelectionCost
from .selectors import (
    DEFAULT_SELECTOR,
    DenseSpan,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    Selector,
    StreamingLLM,
    UniSparse,
    XAttention,
)

__all__ = [
    "DEFAULT_SELECTOR",
    "BlockGeometry",
    "BlockSelection",
    "DenseSpan",
    "FlashPrefill",
    "FlexPrefill",
    "Guards",
    "MInference",
    "MaskProgram",
    "MaskSummary",
    "Oracle",
    "PatchOrder",
    "Pooled",
    "SelectionCost",
    "SelectionRule",
    "Selector",
    "StreamingLLM",
    "TopK",
    "TopP",
    "UniSparse",
    "XAttention",
    "causal_mask_mod",
    "compute_block_scores",
    "create_block_mask",
    "pool_heads",
    "pool_tokens",
    "select_blocks",
    "selection_mask_mod",
    "summarize_mask",
    "to_block_mask",
]
