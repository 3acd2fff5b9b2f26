"""Which blocks are kept: `UniSparse`, selectors of other work to compare with, and the oracle."""

from .block_masks import (
    DEFAULT_SELECTOR,
    BlockSelection,
    PatchOrder,
    Selector,
    UniSparse,
)
from .block_masks.selectors import (
    DenseSpan,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
    selector_of_quality,
)

__all__ = [
    "DEFAULT_SELECTOR",
    "BlockSelection",
    "DenseSpan",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "Oracle",
    "PatchOrder",
    "Selector",
    "StreamingLLM",
    "UniSparse",
    "XAttention",
    "selector_of_quality",
]
