"""Attention over several devices: sequences that ranks share (context parallel).

Tensor, data and pipeline parallel models need nothing of this: `optimize` them as they are.
"""

from .attention import context_parallel_attention
from .context import ContextParallel
from .layout import SequenceLayout, Span

__all__ = ["ContextParallel", "SequenceLayout", "Span", "context_parallel_attention"]
