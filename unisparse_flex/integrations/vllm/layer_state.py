"""What a layer needs to run sparse: its selector, its cache's view, its pages' summaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...block_masks import Selector, UniSparse
from ...block_masks.pages import DecodeSelector, PageSummaries, mean_group, paged_obstacle
from .cache_view import CacheView, has_dtype
from .decode_rows import DecodeSpace
from .kernels import ParentKernel
from .layers import refuse_layer
from .reasons import Reason

# Keys of the smallest pages that have summaries for decoding: of smaller ones these take too much.
DECODE_PAGE = 64


@dataclass(slots=True, eq=False)
class LayerState:
    """One attention layer of a rank.

    Attributes:
        name: As vLLM names it.
        kernel: What attends to selected blocks.
        selector: Which blocks are kept; ``None`` where it stays with the parent.
        reason: Why it does; ``None`` where it does not.
        decode: Which keys its decoding reads; ``None`` where it reads all.
        view: Its cache, once there is one.
        units: The same in the units of ``decode``.
        summaries: Those of its pages.
        copies_keys: Why a selection copies a request's keys out of the pages; ``None`` where it
            reads them there.
        space: What choosing units for decoding writes to; ``None`` where it decodes densely.
    """

    name: str
    kernel: ParentKernel
    selector: Selector | None
    reason: Reason | None
    decode: DecodeSelector | None = None
    view: CacheView | None = None
    units: CacheView | None = None
    summaries: PageSummaries | None = None
    copies_keys: str | None = None
    space: DecodeSpace | None = None
    _bound: tuple[int, torch.Size] | None = field(default=None)

    @classmethod
    def create(
        cls,
        name: str,
        impl: Any,
        kernel: ParentKernel,
        setting: Selector | Reason,
        *,
        decode: DecodeSelector | None = None,
    ) -> LayerState:
        """The state of a layer with a selector, or a reason for none."""
        if isinstance(setting, Reason):
            return cls(name, kernel, None, setting)
        reason = refuse_layer(impl, setting)
        return cls(name, kernel, None if reason else setting, reason, None if reason else decode)

    @property
    def is_bound(self) -> bool:
        """Whether its cache is known, or needed for nothing."""
        return self.reason is not None or self.view is not None

    def bind(self, layer: Any, cache: Tensor, dtype: torch.dtype) -> None:
        """Makes the views and the summaries of a cache; of the same cache again, nothing.

        Args:
            layer: vLLM's layer.
            cache: Its cache; empty before the engine has made one.
            dtype: Of its queries.
        """
        if self.selector is None or cache.numel() == 0:
            return
        bound = cache.data_ptr(), cache.shape
        if bound == self._bound:
            return
        self._bound = bound
        found = self.kernel.view(layer, cache)
        if isinstance(found, Reason):
            self._refuse(found)
        elif not has_dtype(cache, dtype):
            self._refuse(Reason.DTYPE)
        elif self.selector.block_size % found.pages.shape[2]:
            self._refuse(Reason.PAGE_SIZE)
        else:
            page = found.pages.shape[2]
            c_k = self.selector.c_k if isinstance(self.selector, UniSparse) else page
            self.view = found
            unit = None
            if self.decode is not None and page < DECODE_PAGE:
                self.decode = None
            if self.decode is not None:
                units = self.kernel.view(layer, cache, min(self.decode.unit, page))
                assert isinstance(units, CacheView)
                self.units, unit = units, units.unit
                self.decode = self.decode.of_unit(unit)
            self.summaries = PageSummaries.create(found.pages, mean_group(c_k, page), unit=unit)
            self.copies_keys = paged_obstacle(self.selector, found.pages)

    def _refuse(self, reason: Reason) -> None:
        self.selector, self.reason, self.view, self.summaries = None, reason, None, None

    def written(self, slots: Tensor) -> None:
        """Brings the summaries up to date with the keys written to ``slots``."""
        if self.summaries is not None:
            self.summaries.update(slots)
