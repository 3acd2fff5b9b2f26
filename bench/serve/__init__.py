"""A served model: prefill sparse against the parent backend, in engines of this process."""

from .tables import describe

__all__ = ["describe"]
