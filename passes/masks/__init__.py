"""Mask tensors proved to be formulas of positions."""

from .prove import MaskCache, Unproved
from .proved_mask import ProvedMask
from .trace import trace_mask

__all__ = [
    "MaskCache",
    "ProvedMask",
    "Unproved",
    "trace_mask",
]
