"""Quality of decoding that reads a part of the cache, by what is kept of each page."""

from .tables import describe, describe_together

__all__ = ["describe", "describe_together"]
