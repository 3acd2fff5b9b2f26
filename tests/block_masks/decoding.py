"""Requests that decode: their keys in a cache, and one query row of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    PageSummaries,
    PageTables,
    UnitSummaries,
    choose_units,
)


@dataclass(frozen=True)
class Decoding:
    """A batch of decoding requests.

    Attributes:
        query: [B, Hq, D].
        summaries: Those of the cache, up to date.
        tables: int32 [B, n].
        lengths: int32 [B].
        keys: [Hkv, length, D] of each request, in order.
    """

    query: Tensor
    summaries: PageSummaries
    tables: Tensor
    lengths: Tensor
    keys: list[Tensor]

    @property
    def units(self) -> UnitSummaries:
        """Those of the cache."""
        assert self.summaries.units is not None
        return self.summaries.units

    @property
    def steps(self) -> tuple[int, int, int]:
        """Of the numbers of units in a cache that is contiguous."""
        heads, page = self.summaries.pages.shape[1:3]
        return heads * page // self.units.unit, page // self.units.unit, 1

    def outputs(self) -> PageTables:
        """Room for the chosen units."""
        heads, units = self.units.numbers.shape[1:3]
        batch, width = self.tables.shape
        counter = torch.zeros(2, dtype=torch.int64, device=self.query.device)
        return PageTables.create(batch * heads, width * units, counter)

    def choose(
        self,
        selector: DecodeSelector,
        out: PageTables,
        *,
        scale: float,
        few: int = 0,
        is_behind: bool = False,
    ) -> None:
        """Writes what the requests read; where summaries are behind, of keys known to them then."""
        choose_units(
            self.query,
            self.units,
            self.tables,
            self.lengths,
            out,
            selector=selector,
            scale=scale,
            steps=self.steps,
            few=few,
            written=self.summaries if is_behind else None,
        )


def create_decoding(
    lengths: Sequence[int],
    *,
    page: int = 16,
    unit: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    shared: int = 0,
    pinned: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Decoding:
    """Writes keys token by token into shuffled pages that were used before.

    Args:
        lengths: Keys of each request.
        page: Keys of a page.
        unit: Keys of a unit.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Numbers of a row.
        shared: Pages at their beginning that all long enough requests share.
        pinned: Share of all units that stay.
        dtype: Of queries and keys.
        device: Where they are.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    counts = [-(-length // page) for length in lengths]
    cache = draw(sum(counts) + 3, kv_heads, page, head_dim)
    summaries = PageSummaries.create(cache, page, unit=unit)
    # What earlier requests left behind.
    summaries.update(torch.arange(cache.shape[0] * page, device=device))
    free = torch.randperm(cache.shape[0], generator=generator).tolist()
    common = [free.pop() for _ in range(min(shared, *(length // page for length in lengths)))]
    tables = torch.zeros(len(lengths), max(*counts, 1) + 2, dtype=torch.int32)
    keys = []
    written: set[int] = set()
    for request, length in enumerate(lengths):
        own = common + [free.pop() for _ in range(counts[request] - len(common))]
        tables[request, : len(own)] = torch.tensor(own, dtype=torch.int32)
        slots = torch.tensor(
            [own[i // page] * page + i % page for i in range(length)], dtype=torch.int64
        )
        fresh = torch.tensor([slot not in written for slot in slots.tolist()], dtype=torch.bool)
        written.update(slots.tolist())
        scale = 1 + 3 * torch.rand(length, generator=generator).to(device, dtype)
        new = draw(length, kv_heads, head_dim) * scale[:, None, None]
        at = slots[fresh].to(device)
        cache[at // page, :, at % page] = new[fresh.to(device)]
        half = at.shape[0] // 2
        for part in (at[:half], *at[half:].split(1)):
            summaries.update(part)
        held = slots.to(device)
        keys.append(cache[held // page, :, held % page].transpose(0, 1))
    query = draw(len(lengths), heads, head_dim) * 2
    assert summaries.units is not None
    stays = torch.rand(summaries.units.pinned.shape, generator=generator) < pinned
    summaries.units.pinned.copy_(stays)
    count = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Decoding(query, summaries, tables.to(device), count, keys)
