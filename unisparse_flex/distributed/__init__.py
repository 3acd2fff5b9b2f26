"""Attention over several devices: sequences that ranks share (context parallel).

Tensor, data and pipeline parallel models need nothing of this: `optimize` them as they are;
`validate_same_settings` checks that every rank did so alike.
"""

from .agreement import validate_same_settings
from .attention import context_parallel_attention
from .context import ContextParallel
from .heads import shard_heads
from .layout import SequenceLayout, Span

__all__ = [
    "ContextParallel",
    "SequenceLayout",
    "Span",
    "context_parallel_attention",
    "shard_heads",
    "validate_same_settings",
]
