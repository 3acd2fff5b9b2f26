"""`PagedKeys`: the keys of one sequence where a cache holds them.

Symbols: Hkv key heads, P keys of a page, S keys, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..granularity import CompositeKeys, mark_not_finite


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PagedKeys:
    """The keys of one sequence in the pages of a cache.

    Attributes:
        pages: [all pages, Hkv, P, D], a view of the cache with the pages of every sequence.
        table: int32 [n], the pages of this one in order; n is at least ceil(length / P).
        length: Its keys.
        means: [all pages, Hkv, R, D] of `PageSummaries`, up to date for its finished pages.
    """

    pages: Tensor
    table: Tensor
    length: int
    means: Tensor

    @property
    def page(self) -> int:
        """Keys of a page."""
        return self.pages.shape[2]

    def gather(self) -> Tensor:
        """The keys as one tensor, a copy: [1, Hkv, length, D]."""
        held = self.pages[self.table[: -(-self.length // self.page)].long()]
        return held.transpose(0, 1).flatten(1, 2)[None, :, : self.length]

    def composites(self, c_k: int, *, groups: int) -> CompositeKeys:
        """Composite keys, from the means of finished pages and the keys of the last one.

        Args:
            c_k: Keys per composite key; a multiple of those of a mean.
            groups: Composite keys in the result, at least ceil(length / c_k).

        Returns:
            Tokens [1, Hkv, groups, D] in float32 (float64 for float64 keys), as `pool_tokens`.
        """
        group = self.page // self.means.shape[2]
        accumulate = torch.float64 if self.pages.dtype == torch.float64 else torch.float32
        finished = self.length // self.page
        means = self.means[self.table[:finished].long()].to(accumulate)
        means = means.transpose(0, 1).flatten(1, 2)
        last = self.pages[self.table[finished:].long()[:1]].to(accumulate)
        last = last.transpose(0, 1).flatten(1, 2)[:, : self.length - finished * self.page]
        heads, head_dim = means.shape[0], means.shape[2]
        sums = means.new_zeros((heads, groups * (c_k // group), head_dim))
        sums[:, : means.shape[1]] = means * group
        for start in range(0, last.shape[1], group):
            place = means.shape[1] + start // group
            sums[:, place] = last[:, start : start + group].sum(1)
        sums = sums.unflatten(1, (groups, -1)).sum(2)
        first = torch.arange(groups, device=sums.device) * c_k
        counts = (self.length - first).clamp(0, c_k).to(accumulate)
        tokens = mark_not_finite(sums / counts.clamp_min(1)[None, :, None])
        return CompositeKeys(tokens=tokens[None], counts=counts[None])
