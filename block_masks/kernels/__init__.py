"""Scoring and selection in Triton."""

from .operator import select_lists

__all__ = [
    "select_lists",
]
