"""Estimates of the masses of units, each from what is kept of a page.

Symbols as in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import UnitSummaries, estimate_masses

from .rows import Rows

# From rows and U, logarithms of masses up to a constant, [B, Hkv, G, n]; -inf for units that a row
# does not see. Pages are units.
Estimate = Callable[[Rows], Tensor]
BYTES = 2  # of a coordinate of keys and values, in a cache of 16 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What is kept of the keys of a unit.

    Attributes:
        estimate: How masses are estimated from it.
        of_coordinate: Bytes that are kept of every coordinate, beside a cache of 16 bits.
        of_unit: Bytes that are kept beside these.
        pins: Whether units that the end of the prompt looked at stay.
    """

    estimate: Estimate
    of_coordinate: int = 0
    of_unit: int = 0
    pins: bool = False

    def memory(self, unit: int, head_dim: int) -> float:
        """Its share of a cache of 16 bits; keys and values count."""
        kept = self.of_coordinate * head_dim + self.of_unit
        return kept / (2 * BYTES * unit * head_dim)


def library(rows: Rows) -> Tensor:
    """The library's: mean and standard deviation of every coordinate in 8 bits."""
    units = UnitSummaries.create(rows.pages, rows.page)
    at = torch.arange(len(rows.pages), device=rows.pages.device)
    units.write(rows.pages, at, torch.zeros_like(at), _held(rows))
    return estimate_masses(rows.query, units, rows.tables, rows.lengths, scale=rows.scale)


def mean(rows: Rows) -> Tensor:
    """The logarithm of its keys' number, and the logit of their mean."""
    keys = rows.pages.float().where(_held(rows), 0.0)
    means = keys.sum(2) / rows.held[:, None, None].clamp_min(1)
    logits = torch.einsum("bhgd,bnhd->bhgn", rows.grouped_query, _of_rows(means, rows))
    return _seen(logits + rows.held[rows.tables.long()][:, None, None].log(), rows)


def quest(rows: Rows) -> Tensor:
    """The highest logit that a key within the page's bounds can have (Quest, arXiv 2406.10774).

    The bounds are the least and the greatest value of every coordinate.
    """
    held, query = _held(rows), rows.grouped_query
    low = rows.pages.masked_fill(~held, torch.inf).amin(2)
    high = rows.pages.masked_fill(~held, -torch.inf).amax(2)
    bound = torch.einsum("bhgd,bnhd->bhgn", query.clamp_min(0), _of_rows(high, rows))
    bound += torch.einsum("bhgd,bnhd->bhgn", query.clamp_max(0), _of_rows(low, rows))
    return _seen(bound, rows)


# The library's is the first; the second has nothing pinned. The true masses, which nothing that is
# kept gives, are a bound.
SUMMARIES = {
    "pinned": Summary(estimate=library, of_coordinate=2, of_unit=5, pins=True),
    "unisparse": Summary(estimate=library, of_coordinate=2, of_unit=4),
    "mean": Summary(estimate=mean, of_coordinate=2),
    "quest": Summary(estimate=quest, of_coordinate=4),
    "quest-pinned": Summary(estimate=quest, of_coordinate=4, of_unit=1, pins=True),
    "oracle": Summary(estimate=Rows.masses),
}


def _held(rows: Rows) -> Tensor:
    """Which places of pages hold keys, bool [N, 1, P, 1]."""
    places = torch.arange(rows.page, device=rows.held.device)
    return (places < rows.held[:, None])[:, None, :, None]


def _of_rows(vectors: Tensor, rows: Rows) -> Tensor:
    """Vectors [N, Hkv, D] of the pages of each row, in the keys' dtype as they would be kept.

    Returns:
        float32 [B, n, Hkv, D]; zeros for pages that a row does not see.
    """
    kept = vectors.to(rows.pages.dtype)[rows.tables.long()].float()
    return kept.where(_visible(rows)[..., None, None], 0.0)


def _visible(rows: Rows) -> Tensor:
    """Which pages each row sees, bool [B, n]."""
    order = torch.arange(rows.tables.shape[1], device=rows.tables.device)
    return order * rows.page < rows.lengths[:, None]


def _seen(masses: Tensor, rows: Rows) -> Tensor:
    return masses.masked_fill(~_visible(rows)[:, None, None], -torch.inf)
