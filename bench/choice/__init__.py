"""Density and KL against the cost of choosing blocks, for orders of keys and estimates."""

from .curves import curve
from .tables import describe

__all__ = ["curve", "describe"]
