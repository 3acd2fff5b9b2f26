"""Attention over several devices: tensor parallel and context parallel."""

from .tables import describe

__all__ = ["describe"]
