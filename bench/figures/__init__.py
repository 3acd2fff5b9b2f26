"""Pictures of the documentation, and what the benchmarks' plots have in common."""

from .curves import interpolate
from .style import COLORS, DASHES, MARKERS

__all__ = ["COLORS", "DASHES", "MARKERS", "interpolate"]
