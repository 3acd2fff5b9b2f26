"""The selectors: one file and one line here for each."""

from .base import Selector
from .streaming_llm import StreamingLLM
from .unisparse import UniSparse
from .xattention import XAttention

__all__ = ["Selector", "StreamingLLM", "UniSparse", "XAttention"]
