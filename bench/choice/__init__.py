"""Density and KL against the cost of choosing blocks, for orders of keys and estimates."""

from .curves import curve, default_kl
from .tables import describe

__all__ = ["curve", "default_kl", "describe"]
