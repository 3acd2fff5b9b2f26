"""A layer's cache as pages of one head each, which the parents' kernels read without a copy.

Symbols: N pages, Hkv key heads, P keys of a page, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reasons import Reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CacheView:
    """Views of one layer's cache.

    Attributes:
        pages: [N, Hkv, P, D], its keys.
        key: Keys as a cache of one head; the page of a head has the number
            ``page * steps[0] + head * steps[1]``.
        value: Values, likewise.
        steps: See ``key``.
    """

    pages: Tensor
    key: Tensor
    value: Tensor
    steps: tuple[int, int]


def view_packed(cache: Tensor) -> CacheView | Reason:
    """The cache of the GPU backends: [N, Hkv, P, 2 * D], keys beside values, in any memory order.

    Where the heads of a token lie side by side, pages of one head overlap in memory: their rows
    are Hkv tokens' heads apart.
    """
    if cache.dim() != 4 or cache.stride(3) != 1 or cache.shape[3] % 2:
        return Reason.LAYOUT
    count, heads, page, width = cache.shape
    stride_page, stride_head, stride_row, _ = cache.stride()
    if heads == 1:
        unit, steps, pages = stride_page, (1, 0), count
    else:
        unit, steps = stride_head, (stride_page // stride_head, 1)
        pages = (count - 1) * steps[0] + heads
        if stride_page % stride_head or pages >= 2**31:
            return Reason.LAYOUT
    head_dim = width // 2
    # The stride of the only head says nothing, but copies in hardware ask for an aligned one.
    strides = (unit, stride_row, stride_row, 1)
    start = cache.storage_offset()
    key, value = (
        cache.as_strided((pages, page, 1, head_dim), strides, start + offset)
        for offset in (0, head_dim)
    )
    return CacheView(pages=cache[..., :head_dim], key=key, value=value, steps=steps)


def view_transposed(cache: Tensor) -> CacheView | Reason:
    """The cache of the CPU's vector kernels: [N, Hkv, P, 2 * D] by name alone.

    Of every page and head the keys come first, as [D, P], then the values, as [P, D].
    """
    if cache.dim() != 4 or not cache.is_contiguous() or cache.shape[3] % 2:
        return Reason.LAYOUT
    count, heads, page, width = cache.shape
    head_dim = width // 2
    pages = cache.as_strided(
        (count, heads, page, head_dim),
        (heads * page * width, page * width, 1, page),
        cache.storage_offset(),
    )
    key, value = cache.view(count * heads, 1, 2 * page, head_dim).chunk(2, dim=2)
    return CacheView(pages=pages, key=key, value=value, steps=(heads, 1))


def has_dtype(cache: Tensor, dtype: torch.dtype) -> bool:
    """Whether queries of a dtype meet a cache of theirs that kernels read."""
    return cache.dtype == dtype and dtype in (torch.float16, torch.bfloat16, torch.float32)
