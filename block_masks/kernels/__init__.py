"""Scoring and selection in Triton."""

from .operator import (
    MEASURED,
    obstacle,
    pool_keys,
    prepare_mask,
    select_lists,
    supports_keys,
)

__all__ = [
    "MEASURED",
    "obstacle",
    "pool_keys",
    "prepare_mask",
    "select_lists",
    "supports_keys",
]
