"""Which blocks: composite tokens, scores, selection, BlockMask. Knows torch, nothing of graphs."""

from .block_mask import causal_mask_mod, create_block_mask, selection_mask_mod, to_block_mask
from .block_selection import BlockSelection
from .geometry import BlockGeometry
from .granularity import CompositeKeys, Pooled, Sampled, pool_heads, pool_tokens
from .mask_summary import MaskSummary, summarize, summarize_mask, visible_tokens
from .masks import MaskProgram
from .patch_order import PatchOrder
from .scoring import (
    compute_block_scores,
    compute_mean_scores,
    compute_sampled_scores,
    default_scale,
    supports_dtype,
)
from .selection import (
    ForcedBlocks,
    SelectionRule,
    Threshold,
    TopK,
    TopP,
    select_blocks,
    valid_blocks,
)
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
from .strides import fix_strides
from .validation import (
    validate_attn_mask,
    validate_block_size,
    validate_causality,
    validate_fraction,
    validate_int,
    validate_query_key,
    validate_scale,
    validate_value,
)

__all__ = [
    "DEFAULT_SELECTOR",
    "BlockGeometry",
    "BlockSelection",
    "CompositeKeys",
    "DenseSpan",
    "FlashPrefill",
    "FlexPrefill",
    "ForcedBlocks",
    "MInference",
    "MaskProgram",
    "MaskSummary",
    "Oracle",
    "PatchOrder",
    "Pooled",
    "Sampled",
    "SelectionCost",
    "SelectionRule",
    "Selector",
    "StreamingLLM",
    "Threshold",
    "TopK",
    "TopP",
    "UniSparse",
    "XAttention",
    "causal_mask_mod",
    "compute_block_scores",
    "compute_mean_scores",
    "compute_sampled_scores",
    "create_block_mask",
    "default_scale",
    "fix_strides",
    "pool_heads",
    "pool_tokens",
    "select_blocks",
    "selection_mask_mod",
    "summarize",
    "summarize_mask",
    "supports_dtype",
    "to_block_mask",
    "valid_blocks",
    "validate_attn_mask",
    "validate_block_size",
    "validate_causality",
    "validate_fraction",
    "validate_int",
    "validate_query_key",
    "validate_scale",
    "validate_value",
    "visible_tokens",
]
