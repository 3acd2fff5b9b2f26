"""Scoring and selection in Triton."""

from .decode_rule import DecodeRule
from .mask_reading import read_mask, runs_mask_kernels, turn_keys
from .operator import (
    MEASURED,
    choose_units,
    keys_obstacle,
    name_pages,
    obstacle,
    pool_keys,
    prepare_mask,
    select_lists,
    select_lists_from_pages,
    summarize_pages,
    summarize_rows,
    supports_keys,
    supports_pages,
)
from .self_check import gpu_kind, known_failure, remembered
from .settings import KernelSettings, settings_of

__all__ = [
    "MEASURED",
    "DecodeRule",
    "KernelSettings",
    "choose_units",
    "gpu_kind",
    "keys_obstacle",
    "known_failure",
    "name_pages",
    "obstacle",
    "pool_keys",
    "prepare_mask",
    "read_mask",
    "remembered",
    "runs_mask_kernels",
    "select_lists",
    "select_lists_from_pages",
    "settings_of",
    "summarize_pages",
    "summarize_rows",
    "supports_keys",
    "supports_pages",
    "turn_keys",
]
