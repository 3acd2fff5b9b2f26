"""A layer's cache as pages of one head each, which the parents' kernels read without a copy.

Symbols: N pages, Hkv key heads, P keys of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from .reasons import Reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CacheView:
    """Views of one layer's cache: all of its pages, and units of them as pages of one head.

    Attributes:
        pages: [N, Hkv, P, D], its keys.
        key: Keys as a cache of one head, in pages of U keys; the unit of a page and head has the
            number ``page * steps[0] + head * steps[1] + unit * steps[2]``.
        value: Values, likewise.
        steps: See ``key``.
        unit: U, P or a part of it.
    """

    pages: Tensor
    key: Tensor
    value: Tensor
    steps: tuple[int, int, int]
    unit: int


def view_packed(cache: Tensor, unit: int | None = None) -> CacheView | Reason:
    """The cache of the GPU backends: [N, Hkv, P, 2 * D], keys beside values, in any memory order.

    Where the heads of a token lie side by side, units of one head overlap in memory: their rows
    are Hkv tokens' heads apart.

    Args:
        cache: A layer's.
        unit: U, which divides P; P by default.
    """
    if cache.dim() != 4 or cache.stride(3) != 1 or cache.shape[3] % 2:
        return Reason.LAYOUT
    count, heads, page, width = cache.shape
    unit = page if unit is None else unit
    stride_page, stride_head, stride_row, _ = cache.stride()
    # The stride of the only head, as of the only unit, says nothing.
    apart = stride_page, stride_head * (heads > 1), unit * stride_row * (unit < page)
    step = gcd(*apart)
    per_page, per_head, per_unit = (distance // step for distance in apart)
    last = (count - 1) * per_page + (heads - 1) * per_head + (page // unit - 1) * per_unit
    if last >= 2**31:
        return Reason.LAYOUT
    head_dim = width // 2
    # Copies in hardware ask for an aligned stride of the only head.
    strides = (step, stride_row, stride_row, 1)
    start = cache.storage_offset()
    key, value = (
        cache.as_strided((last + 1, unit, 1, head_dim), strides, start + offset)
        for offset in (0, head_dim)
    )
    return CacheView(
        pages=cache[..., :head_dim],
        key=key,
        value=value,
        steps=(per_page, per_head, per_unit),
        unit=unit,
    )


def view_transposed(cache: Tensor) -> CacheView | Reason:
    """The cache of the CPU's vector kernels: [N, Hkv, P, 2 * D] by name alone.

    Of every page and head the keys come first, as [D, P], then the values, as [P, D]: a page is
    no row of smaller ones.
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
    return CacheView(pages=pages, key=key, value=value, steps=(heads, 1, 0), unit=page)


def has_dtype(cache: Tensor, dtype: torch.dtype) -> bool:
    """Whether queries of a dtype meet a cache of theirs that kernels read."""
    return cache.dtype == dtype and dtype in (torch.float16, torch.bfloat16, torch.float32)
