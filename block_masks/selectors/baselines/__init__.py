"""Selectors of other work, and the block oracle, to compare with."""

from .flash_prefill import FlashPrefill
from .flex_prefill import FlexPrefill
from .minference import MInference
from .oracle import Oracle
from .streaming_llm import StreamingLLM
from .xattention import XAttention

__all__ = [
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "Oracle",
    "StreamingLLM",
    "XAttention",
]
