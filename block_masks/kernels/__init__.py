"""Scoring and selection in Triton."""

from .operator import LEAST_CAPABILITY, pool_keys, select_lists, takes, takes_keys

__all__ = [
    "LEAST_CAPABILITY",
    "pool_keys",
    "select_lists",
    "takes",
    "takes_keys",
]
