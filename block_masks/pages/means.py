"""Means of the keys of a page, made once when its last key is written.

Symbols: Hkv key heads, P keys of a page, D head_dim.
"""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from ..granularity import mark_not_finite


def mean_group(c_k: int, page: int) -> int:
    """Keys of one mean, where composite keys hold ``c_k`` and pages ``page``; powers of two."""
    return min(c_k, page)


def create_means(pages: Tensor, group: int) -> Tensor:
    """Room for the means of every ``group`` keys: [all pages, Hkv, P / group, D], keys' dtype.

    Args:
        pages: [all pages, Hkv, P, D].
        group: Keys of a mean; divides P.

    Returns:
        Zeros; the share of the keys that they take up is 1 / group.
    """
    count, heads, page, head_dim = pages.shape
    return pages.new_zeros((count, heads, page // group, head_dim))


def summarize_pages(pages: Tensor, means: Tensor, slots: Tensor) -> None:
    """Fills the means of the pages whose last key was just written; graphs may record it on CUDA.

    A page is finished when its last place is written, so a page that another sequence takes over
    has means of its own as soon as it is full again.

    Args:
        pages: [all pages, Hkv, P, D], a view of the cache.
        means: From `create_means`; changed in place.
        slots: int64 [tokens], where keys were written: page * P + place. Negative ones are none.
    """
    if slots.shape[0] == 0:
        return
    if pages.device.type == "cuda":
        kernels.summarize_pages(pages, means, slots)
        return
    page = pages.shape[2]
    finished = slots[(slots >= 0) & (slots % page == page - 1)] // page
    keys = pages[finished].unflatten(2, (means.shape[2], -1))
    means[finished] = mark_not_finite(keys.float().mean(3)).to(means.dtype)
