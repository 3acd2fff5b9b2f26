"""Scoring and selection in Triton."""

from .operator import (
    MEASURED,
    name_pages,
    obstacle,
    pool_keys,
    prepare_mask,
    select_lists,
    select_lists_from_pages,
    summarize_pages,
    supports_keys,
    supports_pages,
)

__all__ = [
    "MEASURED",
    "name_pages",
    "obstacle",
    "pool_keys",
    "prepare_mask",
    "select_lists",
    "select_lists_from_pages",
    "summarize_pages",
    "supports_keys",
    "supports_pages",
]
