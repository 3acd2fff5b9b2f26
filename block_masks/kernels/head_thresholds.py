"""Thresholds of heads where the selection kernel reads them: one tensor for a device, made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from ..selection import validate_per_head
from .settings import KernelSettings, decode_settings

# How the text of settings ends where all heads have one threshold.
ONE_FOR_ALL = "[]]"


@torch.compiler.assume_constant_result
def prepare_thresholds(thresholds: tuple[float, ...], q_heads: int, device: torch.device) -> bool:
    """Makes the tensor of a call before it runs; true.

    A graph finds it made: while it is captured nothing can be copied to the device.

    Args:
        thresholds: Of every query head.
        q_heads: Query heads of the call.
        device: Where it selects.

    Raises:
        ValueError: There are more or fewer thresholds than heads.
    """
    validate_per_head(thresholds, "head_thresholds", q_heads)
    _on_device(thresholds, device)
    return True


def thresholds_on(settings: KernelSettings, device: torch.device) -> tuple[Tensor, ...]:
    """Thresholds of the query heads, float32 [Hq], or nothing where all have one."""
    return (_on_device(settings.head_thresholds, device),) if settings.head_thresholds else ()


def thresholds_of_text(settings: str, device: torch.device) -> tuple[Tensor, ...]:
    """`thresholds_on` for settings as `encode_settings` writes them."""
    if settings.endswith(ONE_FOR_ALL):
        return ()
    return thresholds_on(decode_settings(settings), device)


@lru_cache(maxsize=4096)
def _on_device(thresholds: tuple[float, ...], device: torch.device) -> Tensor:
    # Modes of tracing, and pools of memory that a graph owns, are a thread's own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(torch.tensor, thresholds, dtype=torch.float32, device=device).result()
