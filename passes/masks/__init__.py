"""Mask tensors proved to be formulas of positions."""

from .prove import LiftedMask, MaskCache, Unproved
from .trace import TracedMask, trace_mask

__all__ = [
    "LiftedMask",
    "MaskCache",
    "TracedMask",
    "Unproved",
    "trace_mask",
]
