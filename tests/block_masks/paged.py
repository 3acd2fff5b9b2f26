"""A cache of pages with the keys of one sequence scattered over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import PagedKeys, PageSummaries, mean_group


@dataclass(frozen=True)
class Cache:
    """Keys and values in pages, and the page tables of one sequence.

    Attributes:
        key: [1, Hkv, S, D], the keys in order.
        value: [1, Hkv, S, D].
        packed: [pages, Hkv, P, 2 * D], the cache; what no sequence wrote is NaN.
        keys: The keys as they lie there, means up to date.
    """

    key: Tensor
    value: Tensor
    packed: Tensor
    keys: PagedKeys


def fill_cache(
    key: Tensor,
    value: Tensor,
    *,
    page: int,
    c_k: int,
    heads_inside: bool = False,
    chunk: int | None = None,
) -> Cache:
    """Writes a sequence into shuffled pages, in chunks as an engine does.

    Args:
        key: [1, Hkv, S, D].
        value: [1, Hkv, S, D].
        page: Keys of a page.
        c_k: Keys per composite key.
        heads_inside: Whether the heads of a token lie side by side in memory.
        chunk: Keys that are written at a time; all by default.
    """
    heads, length, head_dim = key.shape[1:]
    used = -(-length // page)
    generator = torch.Generator().manual_seed(length)
    table = torch.randperm(used + 3, generator=generator)[:used]
    shape = (used + 3, heads, page, 2 * head_dim)
    if heads_inside:
        packed = key.new_full((shape[0], page, heads, shape[3]), torch.nan).transpose(1, 2)
    else:
        packed = key.new_full(shape, torch.nan)
    table = table.to(key.device)
    pages = packed[..., :head_dim]
    summaries = PageSummaries.create(pages, mean_group(c_k, page))
    token = torch.arange(length, device=key.device)
    slots = table[token // page] * page + token % page
    both = torch.cat([key, value], -1)[0].transpose(0, 1)
    for start in range(0, length, chunk or length):
        part = slots[start : start + (chunk or length)]
        packed[part // page, :, part % page] = both[start : start + (chunk or length)]
        summaries.update(part)
    means = summaries.means
    keys = PagedKeys(pages=pages, table=table.to(torch.int32), length=length, means=means)
    return Cache(key=key, value=value, packed=packed, keys=keys)
