"""What context parallel attention moves between ranks."""

from .tables import describe

__all__ = ["describe"]
