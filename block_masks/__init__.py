"""Which blocks: composite tokens, scores, selection, BlockMask. Knows torch, nothing of graphs."""

from typing import Any

from .block_mask import causal_mask_mod, create_block_mask, selection_mask_mod, to_block_mask
from .block_selection import BlockSelection
from .geometry import BlockGeometry
from .granularity import CompositeKeys, Pooled, Sampled, pool_tokens
from .mask_summary import MaskSummary, summarize
from .patch_order import PatchOrder
from .scoring import (
    compute_block_scores,
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
from .selectors import DEFAULT_SELECTOR, Selector, UniSparse
from .strides import fix_strides

__all__ = [
    "DEFAULT_SELECTOR",
    "BlockGeometry",
    "BlockSelection",
    "CompositeKeys",
    "ForcedBlocks",
    "MaskSummary",
    "PatchOrder",
    "Pooled",
    "Sampled",
    "SelectionCost",
    "SelectionRule",
    "Selector",
    "Threshold",
    "TopK",
    "TopP",
    "UniSparse",
    "causal_mask_mod",
    "compute_block_scores",
    "compute_sampled_scores",
    "create_block_mask",
    "default_scale",
    "fix_strides",
    "pool_tokens",
    "select_blocks",
    "selection_mask_mod",
    "summarize",
    "supports_dtype",
    "to_block_mask",
    "valid_blocks",
]

# Where names of earlier releases are, below unisparse_flex.
_PLACES = {
    "selectors": (
        "DenseSpan",
        "FlashPrefill",
        "FlexPrefill",
        "MInference",
        "Oracle",
        "StreamingLLM",
        "XAttention",
    ),
    "block_masks.granularity": ("pool_heads",),
    "block_masks.mask_summary": ("summarize_mask",),
    "block_masks.masks": ("MaskProgram",),
    "block_masks.scoring": ("compute_mean_scores",),
    "block_masks.validation": (
        "validate_attn_mask",
        "validate_block_size",
        "validate_causality",
        "validate_fraction",
        "validate_int",
        "validate_query_key",
        "validate_scale",
        "validate_value",
    ),
}
_MOVED = {name: f"{place}.{name}" for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        now = f"unisparse_flex.{_MOVED[name]} now"
        raise AttributeError(f"unisparse_flex.block_masks.{name} is {now}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
