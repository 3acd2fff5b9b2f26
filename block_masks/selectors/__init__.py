"""The selectors: one file and one line here for each."""

from .base import Selector, validate_selector
from .dense_span import DenseSpan
from .flash_prefill import FlashPrefill
from .flex_prefill import FlexPrefill
from .minference import MInference
from .oracle import Oracle
from .streaming_llm import StreamingLLM
from .unisparse import DEFAULT_SELECTOR, UniSparse
from .xattention import XAttention

__all__ = [
    "DEFAULT_SELECTOR",
    "DenseSpan",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "Oracle",
    "Selector",
    "StreamingLLM",
    "UniSparse",
    "XAttention",
    "validate_selector",
]
