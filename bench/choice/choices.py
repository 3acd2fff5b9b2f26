"""Choices by their names: an order of keys, an estimate of masses, a mean over rows.

    ORDER[,n][<LAYERS][?SHARE][:q][@SEGMENT[+LAG]]/ESTIMATE[^POWER][#ROWSxKEYS]

``weight@1024/r32`` sorts keys within segments of 1024 and scores by 32 exact rows of a block. With
``+1`` a row's own segment and the one before stay in natural order. ``,n`` keeps the natural order
inside of a sorted block. ``<11`` sorts in the first 11 layers, ``?0.8`` for the key heads whose
last rows then keep less than 0.8 of the blocks. ``:q`` sorts the rows of a segment by content too,
for all keys but those in natural order: two calls whose outputs are merged.

An estimate is a sum of terms that are averaged: ``rN`` exact rows, ``pN`` means of N queries
against block means, ``mNxM`` and ``vNxM`` N rows against M composites of a block, by their mean, or
mean and variance, ``kNxM`` N rows against M sampled keys. ``>rN:F`` after it scores N exact rows
where the first estimate reaches the threshold divided by F. ``^2`` takes the root mean square over
rows. ``~N`` takes the scores of every N-th layer for those after it too, heads matched as well as
can be. ``#64x32`` has blocks of so many rows and keys.

Costs are in rows: a row of every block against every key, with what else scoring does for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from . import estimates, orders
from .parts import BLOCK, Part, Tile

Term = Callable[[Part], Tensor]
# Rows of a natural order are scored so many at a time.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderKind:
    """An order and what finding it costs.

    Attributes:
        order: How it is found.
        rows: Exact rows of a block of 128, two passes over keys for each (peak and sum, then
            columns). Smaller blocks have as many each.
        key_passes: How often keys are read beside that.
    """

    order: orders.Order
    rows: float = 0.0
    key_passes: float = 0.0


def _halvings() -> float:
    """Passes over keys in halving a segment of 1024 into blocks: three times, twice each."""
    return 6.0


ORDERS: dict[str, OrderKind | None] = {
    "none": None,
    "natural": OrderKind(order=orders.natural()),
    "weight": OrderKind(order=orders.by_weight(4), rows=8),
    "weight1": OrderKind(order=orders.by_weight(1), rows=2),
    "weight16": OrderKind(order=orders.by_weight(16), rows=32),
    "highest": OrderKind(order=orders.by_weight(4, highest=True), rows=8),
    "heavy128": OrderKind(order=orders.heavy_first(4, 128), rows=8),
    "heavy128x1": OrderKind(order=orders.heavy_first(1, 128), rows=2),
    "heavy64x1": OrderKind(order=orders.heavy_first(1, 64), rows=2),
    # By one row of every second or fourth block.
    "heavy128of2": OrderKind(order=orders.heavy_first(0.5, 128), rows=1),
    "heavy128of4": OrderKind(order=orders.heavy_first(0.25, 128), rows=0.5),
    "heavy256": OrderKind(order=orders.heavy_first(4, 256), rows=8),
    "heavy512": OrderKind(order=orders.heavy_first(4, 512), rows=8),
    "content": OrderKind(order=orders.by_content(), key_passes=_halvings()),
    "content-means": OrderKind(order=orders.by_content(means=True), key_passes=_halvings()),
    "use": OrderKind(order=orders.by_use(4), rows=8, key_passes=_halvings()),
    "use1": OrderKind(order=orders.by_use(1), rows=2, key_passes=_halvings()),
    "heavy1-content": OrderKind(
        order=orders.heavy_then_content(4, 1), rows=8, key_passes=_halvings()
    ),
    "heavy2-content": OrderKind(
        order=orders.heavy_then_content(4, 2), rows=8, key_passes=_halvings()
    ),
    "heavy1-use": OrderKind(
        order=orders.heavy_then_content(4, 1, use=True), rows=8, key_passes=_halvings()
    ),
    "content2-weight": OrderKind(order=orders.content_then_weight(4, 2), rows=8, key_passes=2),
    "content4-weight": OrderKind(order=orders.content_then_weight(4, 4), rows=8, key_passes=4),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How blocks are chosen, but for the threshold.

    Attributes:
        name: As it was written.
        order: The order of keys; ``None`` for the natural one.
        natural_in_blocks: Whether keys of a sorted block are in natural order inside it.
        sorted_layers: The first so many are sorted; 0 for all.
        sorted_share: A key head is sorted where it then keeps less than this share; 0 for all.
        sorts_rows: Whether rows are sorted for the keys that are.
        segment: Keys that are sorted together, or rows that are scored at once.
        lag: Segments before a row's own that stay in natural order for it.
        terms: What is averaged.
        rows: What scoring costs, in rows, without refinement.
        power: Of the mean over rows.
        refined_rows: Exact rows where it is in doubt, 0 for none.
        factor: How far below the threshold a block may be and still be refined.
        anchor: Every such layer scores for those after it too.
        tile: Its blocks.
    """

    name: str
    order: OrderKind | None
    natural_in_blocks: bool
    sorted_layers: int
    sorted_share: float
    sorts_rows: bool
    segment: int
    lag: int
    terms: tuple[Term, ...]
    rows: float
    power: int
    refined_rows: int
    factor: float
    anchor: int
    tile: Tile

    @classmethod
    def parse(cls, name: str) -> Choice:
        """A choice by its name.

        Raises:
            ValueError: No name of a choice.
        """
        match = re.fullmatch(
            r"([\w-]+?)(,n)?(?:<(\d+))?(?:\?([\d.]+))?(:q)?(?:@(\d+)(?:\+(\d+))?)?/"
            r"([\w+]+?)(?:>r(\d+):([\d.]+))?(?:\^(\d))?(?:~(\d+))?(?:[#|](\d+)x(\d+))?",
            name,
        )
        if match is None or match[1] not in ORDERS:
            raise ValueError(f"choice must be ORDER@SEGMENT/ESTIMATE, got {name!r}")
        tile = Tile(rows=int(match[13] or BLOCK), keys=int(match[14] or BLOCK))
        terms, rows = zip(*[_term(term, tile) for term in match[8].split("+")], strict=True)
        return cls(
            name=name,
            order=ORDERS[match[1]],
            natural_in_blocks=match[2] is not None,
            sorted_layers=int(match[3] or 0),
            sorted_share=float(match[4] or 0),
            sorts_rows=match[5] is not None,
            segment=int(match[6] or ROWS_AT_ONCE),
            lag=int(match[7] or 0),
            terms=terms,
            rows=sum(rows),
            refined_rows=int(match[9] or 0),
            factor=float(match[10] or 1),
            power=int(match[11] or 1),
            anchor=int(match[12] or 1),
            tile=tile,
        )

    def score(self, part: Part, least: Tensor) -> tuple[Tensor, float]:
        """Scores [Hkv, G, Nq, Nk], and their cost in rows; ``least`` is the threshold."""
        masses = [term(part) for term in self.terms]
        if not self.refined_rows:
            return estimates.combine(masses, self.power), self.rows
        first = estimates.combine(masses)
        refined, share = estimates.refine(part, first, self.refined_rows, least / self.factor)
        found = estimates.combine([refined], self.power)
        return found, self.rows + share * self.refined_rows * BLOCK / self.tile.rows


def _term(text: str, tile: Tile) -> tuple[Term, float]:
    match = re.fullmatch(r"([rpmvk])(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"a term must be rN, pN, mNxM, vNxM or kNxM, got {text!r}")
    kind, count, many = match[1], int(match[2]), int(match[3] or 1)
    cells = count * many / tile.part / BLOCK
    if kind == "r":
        return partial(estimates.exact_rows, count=count), count * BLOCK / tile.rows
    if kind == "p":
        return partial(estimates.pooled, rows=count), BLOCK / tile.keys / count
    if kind == "k":
        return partial(estimates.sampled_keys, count=many, rows=count), cells
    variance = kind == "v"
    term = partial(estimates.moments, rows=count, groups=many, variance=variance)
    return term, cells * (2 if variance else 1)
