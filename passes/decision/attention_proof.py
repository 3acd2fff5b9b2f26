"""Whether FlexAttention's kernel was found right on a GPU of a kind that nobody measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ...block_masks import kernels

_found: dict[tuple[int, torch.dtype], str] = {}


@cache
def needs_proof(device: torch.device) -> bool:
    """Whether nobody measured this kind of GPU; every call on one asks."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    measured = torch.cuda.get_device_capability(device) in kernels.MEASURED
    return torch.version.hip is not None or not measured


def attention_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """What was found wrong with attention on a GPU that `needs_proof`, in this process or before.

    Args:
        device: The GPU.
        dtype: Of the queries.

    Returns:
        Empty where nothing was; ``None`` where `prove_attention` was not asked yet.
    """
    key = _index(device), dtype
    if key not in _found:
        known = kernels.known_failure(_kind(*key))
        if known is None:
            return None
        _found[key] = known
    return _found[key]


def prove_attention(device: torch.device, dtype: torch.dtype, find: Callable[[], str]) -> str:
    """What ``find`` finds wrong, or empty: asked once, and kept on disk.

    Logs a warning where something is.
    """
    key = _index(device), dtype
    _found[key] = kernels.remembered(
        _kind(*key), find, consequence="sparse attention fails on this GPU, calls stay dense"
    )
    return _found[key]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _kind(index: int, dtype: torch.dtype) -> str:
    return f"{kernels.gpu_kind(index)}, attention in {str(dtype).removeprefix('torch.')}"
