"""What is kept of the keys of a page: their means and, for decoding, how far they spread.

Symbols: N pages, Hkv key heads, P keys of a page, R groups of a page, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..granularity import mark_not_finite


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PageSummaries:
    """Summaries of all pages of a cache, each of every ``group`` keys of a page.

    A prefill needs means of finished pages. Decoding asks for every page at every token: then
    pages that are being filled have summaries too, of the keys that they hold so far.

    Attributes:
        pages: [N, Hkv, P, D], a view of the cache.
        values: [N, Hkv, R or R + 1, D], keys' dtype: the means, and with ``has_spread`` after them
            one standard deviation of every coordinate, that of keys from their group's mean.
        group: Keys of one group, P / R.
        has_spread: Whether it is made for decoding.
    """

    pages: Tensor
    values: Tensor
    group: int
    has_spread: bool

    @classmethod
    def create(cls, pages: Tensor, group: int, *, has_spread: bool = False) -> PageSummaries:
        """Room for the summaries of a cache, zeros.

        Args:
            pages: [N, Hkv, P, D].
            group: Keys of a group; divides P.
            has_spread: Whether deviations are kept and pages followed as they fill.
        """
        count, heads, page, head_dim = pages.shape
        parts = page // group + has_spread
        values = pages.new_zeros((count, heads, parts, head_dim))
        return cls(pages=pages, values=values, group=group, has_spread=has_spread)

    @property
    def groups(self) -> int:
        """R."""
        return self.pages.shape[2] // self.group

    @property
    def means(self) -> Tensor:
        """[N, Hkv, R, D]."""
        return self.values[:, :, : self.groups]

    @property
    def spreads(self) -> Tensor:
        """[N, Hkv, 1, D], standard deviations; nothing without ``has_spread``."""
        return self.values[:, :, self.groups :]

    def update(self, slots: Tensor) -> None:
        """Brings summaries up to date with keys just written; graphs may record it on CUDA.

        A page is finished when its last place is written, so a page that another sequence takes
        over has a summary of its own as soon as it is full again, or with ``has_spread`` at once.

        Args:
            slots: int64 [tokens], where keys were written: page * P + place, those of a sequence
                side by side and in order. Negative ones are none.
        """
        if slots.shape[0] == 0:
            return
        if self.pages.device.type == "cuda":
            kernels.summarize_pages(
                self.pages, self.values, slots, group=self.group, has_spread=self.has_spread
            )
            return
        page = self.pages.shape[2]
        last = slots % page == page - 1
        if self.has_spread:
            last |= slots.diff(append=slots.new_full((1,), -2)) != 1
        written = slots[(slots >= 0) & last]
        at, places = written // page, written % page
        keys = self.pages[at].unflatten(2, (self.groups, self.group))
        keys = keys.double() if keys.dtype == torch.float64 else keys.float()
        order = torch.arange(page, device=slots.device).view(self.groups, self.group)
        held = (order <= places[:, None, None])[:, None, :, :, None]
        mean = keys.where(held, 0.0).sum(3) / held.sum(3).clamp_min(1)
        parts = [mark_not_finite(mean)]
        if self.has_spread:
            squares = (keys - mean[:, :, :, None]).where(held, 0.0).square().sum((2, 3))
            spread = (squares / (places + 1)[:, None, None]).sqrt()
            parts.append(mark_not_finite(spread)[:, :, None])
        self.values[at] = torch.cat(parts, 2).to(self.values.dtype)


def mean_group(c_k: int, page: int) -> int:
    """Keys of one mean, where composite keys hold ``c_k`` and pages ``page``; powers of two."""
    return min(c_k, page)
