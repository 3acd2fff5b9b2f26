"""Pictures of the documentation, and what the benchmarks' plots have in common."""

from .curves import interpolate, place_of
from .style import COLORS, DASHES, MARKERS

__all__ = ["COLORS", "DASHES", "MARKERS", "interpolate", "place_of"]
