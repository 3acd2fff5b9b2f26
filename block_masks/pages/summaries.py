"""What is kept of the keys in pages: means for prefills, and for decoding what a query reads first.

Symbols: N pages, Hkv key heads, P keys of a page, R groups of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..granularity import mark_not_finite

# The largest number of 8 bits that is used.
LARGEST = 127


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnitSummaries:
    """Mean and standard deviation of the keys of every unit, coordinate by coordinate, in 8 bits.

    Attributes:
        unit: U, a power of two that divides P.
        numbers: int8 [N, Hkv, P / U, 2, D]: of a mean and of deviations, in multiples of a scale.
        scales: [N, Hkv, P / U, 2] in keys' dtype; NaN where keys are not finite.
        pinned: uint8 [N, Hkv, P / U], 1 for units that stay whatever the numbers say: `pin_prompt`.
    """

    unit: int
    numbers: Tensor
    scales: Tensor
    pinned: Tensor

    @classmethod
    def create(cls, pages: Tensor, unit: int) -> UnitSummaries:
        """Room for those of a cache, zeros; `units_share` says how much of it.

        Args:
            pages: [N, Hkv, P, D].
            unit: U.
        """
        count, heads, page, head_dim = pages.shape
        shape = (count, heads, page // unit, 2)
        numbers = pages.new_zeros((*shape, head_dim), dtype=torch.int8)
        pinned = pages.new_zeros(shape[:3], dtype=torch.uint8)
        return cls(unit=unit, numbers=numbers, scales=pages.new_zeros(shape), pinned=pinned)

    @property
    def page(self) -> int:
        """P."""
        return self.numbers.shape[2] * self.unit

    @property
    def nbytes(self) -> int:
        """Memory that they take up."""
        return self.numbers.nbytes + self.scales.nbytes + self.pinned.nbytes

    def read(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of pages: for int64 [...] twice [..., Hkv, P / U, D].

        In float32, or float64 for float64 keys.
        """
        found = _floating(self.scales[at])[..., None] * self.numbers[at]
        return found[..., 0, :], found[..., 1, :]

    def read_pinned(self, at: Tensor) -> Tensor:
        """Which units of requests stay: bool [B, Hkv, n * P / U] for their pages, int64 [B, n]."""
        return self.pinned[at].transpose(1, 2).flatten(2).bool()

    def pin(self, at: Tensor, kept: Tensor) -> None:
        """Says which units of a sequence stay, and that its others do not.

        Args:
            at: int64 [n], its pages in order.
            kept: bool [Hkv, n * P / U].
        """
        self.pinned[at] = kept.unflatten(1, (len(at), -1)).transpose(0, 1).to(torch.uint8)

    def write(self, keys: Tensor, at: Tensor, part: Tensor, held: Tensor) -> None:
        """Summarizes units.

        Args:
            keys: [n, Hkv, U, D] of n units, any floating dtype.
            at: int64 [n], their pages.
            part: int64 [n], which units of these.
            held: bool [n, 1, U, 1], which keys there are.
        """
        keys = _floating(keys)
        count = held.sum(2).clamp_min(1)
        mean = keys.where(held, 0.0).sum(2) / count
        squares = (keys - mean[:, :, None]).where(held, 0.0).square().sum(2)
        found = mark_not_finite(torch.stack([mean, (squares / count).sqrt()], 2))
        scale = (found.abs().amax(-1) / LARGEST).to(self.scales.dtype)
        apart = found / scale.to(found.dtype).where(scale > 0, 1.0)[..., None]
        rounded = (apart.nan_to_num() + 0.5).floor().clamp(-LARGEST, LARGEST)
        self.numbers[at, :, part] = rounded.to(torch.int8)
        self.scales[at, :, part] = scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PageSummaries:
    """Summaries of all pages of a cache.

    A prefill needs means of finished pages. Decoding asks for every page at every token: units of
    pages that are being filled are those of the keys that they hold so far.

    Attributes:
        pages: [N, Hkv, P, D], a view of the cache.
        means: [N, Hkv, R, D], keys' dtype, of every P / R keys.
        units: Summaries for decoding; ``None`` where it is dense.
    """

    pages: Tensor
    means: Tensor
    units: UnitSummaries | None = None

    @classmethod
    def create(cls, pages: Tensor, group: int, *, unit: int | None = None) -> PageSummaries:
        """Room for the summaries of a cache, zeros.

        Args:
            pages: [N, Hkv, P, D].
            group: Keys of a mean; divides P.
            unit: Keys of a unit of decoding; ``None`` for none.
        """
        count, heads, page, head_dim = pages.shape
        means = pages.new_zeros((count, heads, page // group, head_dim))
        units = None if unit is None else UnitSummaries.create(pages, unit)
        return cls(pages=pages, means=means, units=units)

    @property
    def nbytes(self) -> int:
        """Memory that they take up."""
        return self.means.nbytes + (0 if self.units is None else self.units.nbytes)

    def update(self, slots: Tensor) -> None:
        """Brings summaries up to date with keys just written; graphs may record it on CUDA.

        A page is finished when its last place is written, so a page that another sequence takes
        over has means of its own as soon as it is full again, and units of its own at once. Units
        that are written to are pinned no longer.

        Args:
            slots: int64 [tokens], where keys were written: page * P + place, those of a sequence
                side by side and in order. Negative ones are none.
        """
        if slots.shape[0] == 0:
            return
        if self.pages.device.type == "cuda":
            own = self.units
            units = None if own is None else (own.numbers, own.scales, own.pinned)
            kernels.summarize_pages(self.pages, self.means, units, slots)
            return
        page = self.pages.shape[2]
        is_full = (slots >= 0) & (slots % page == page - 1)
        finished = slots[is_full] // page
        keys = _floating(self.pages[finished]).unflatten(2, (self.means.shape[2], -1))
        self.means[finished] = mark_not_finite(keys.mean(3)).to(self.means.dtype)
        if self.units is None:
            return
        unit = self.units.unit
        goes_on = slots.diff(append=slots.new_full((1,), -2)) == 1
        last = slots[(slots >= 0) & ~(goes_on & (slots % unit < unit - 1))]
        at, part = last // page, last % page // unit
        keys = self.pages.unflatten(2, (-1, unit))[at, :, part]
        held = torch.arange(unit, device=slots.device) <= (last % unit)[:, None]
        self.units.write(keys, at, part, held[:, None, :, None])
        self.units.pinned[at, :, part] = 0


def units_share(unit: int, head_dim: int) -> float:
    """What `UnitSummaries` take up, as a share of a cache of 16 bits, keys and values."""
    return (2 * head_dim + 5) / (4 * unit * head_dim)


def mean_group(c_k: int, page: int) -> int:
    """Keys of one mean, where composite keys hold ``c_k`` and pages ``page``; powers of two."""
    return min(c_k, page)


def _floating(keys: Tensor) -> Tensor:
    return keys if keys.dtype == torch.float64 else keys.float()
