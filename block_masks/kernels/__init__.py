"""Scoring and selection in Triton."""

from .operator import (
    LEAST_CAPABILITY,
    MEASURED,
    obstacle,
    pool_keys,
    prepare_mask,
    select_lists,
    supports_keys,
)

__all__ = [
    "LEAST_CAPABILITY",
    "MEASURED",
    "obstacle",
    "pool_keys",
    "prepare_mask",
    "select_lists",
    "supports_keys",
]
