"""The selectors: one file and one line here for each."""

from .base import Selector
from .flash_prefill import FlashPrefill
from .oracle import Oracle
from .streaming_llm import StreamingLLM
from .unisparse import UniSparse
from .xattention import XAttention

__all__ = ["FlashPrefill", "Oracle", "Selector", "StreamingLLM", "UniSparse", "XAttention"]
