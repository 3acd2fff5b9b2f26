"""The selectors: one file and one line here for each."""

from .base import ForcesBlocks, RenamesFields, Selector, validate_selector
from .baselines import FlashPrefill, FlexPrefill, MInference, Oracle, StreamingLLM, XAttention
from .dense_span import DenseSpan
from .quality import QUALITIES, choose_selector, selector_of_quality
from .unisparse import DEFAULT_SELECTOR, DROPPED_THRESHOLDS, UniSparse, default_top_p

__all__ = [
    "DEFAULT_SELECTOR",
    "DROPPED_THRESHOLDS",
    "QUALITIES",
    "DenseSpan",
    "FlashPrefill",
    "FlexPrefill",
    "ForcesBlocks",
    "MInference",
    "Oracle",
    "RenamesFields",
    "Selector",
    "StreamingLLM",
    "UniSparse",
    "XAttention",
    "choose_selector",
    "default_top_p",
    "selector_of_quality",
    "validate_selector",
]
