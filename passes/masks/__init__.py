"""Mask tensors proved to be formulas of positions."""

from .given import given_identity
from .prove import MaskCache, Unproved
from .proved_mask import ProvedMask
from .trace import trace_mask

__all__ = [
    "MaskCache",
    "ProvedMask",
    "Unproved",
    "given_identity",
    "trace_mask",
]
