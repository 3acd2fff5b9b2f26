"""Raster against tile order for the patches of real clips."""

from .tables import describe

__all__ = ["describe"]
