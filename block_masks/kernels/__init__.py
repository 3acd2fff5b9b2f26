"""Scoring and selection in Triton."""

from ..key_intervals import IntervalTables
from .operator import (
    LEAST_CAPABILITY,
    pool_keys,
    prepare_mask,
    select_lists,
    supports,
    supports_keys,
)

__all__ = [
    "LEAST_CAPABILITY",
    "IntervalTables",
    "pool_keys",
    "prepare_mask",
    "select_lists",
    "supports",
    "supports_keys",
]
