"""Seconds of choosing and attending, from the measured rates of the library's kernels.

Selection is linear in the rows that it scores: the two settings that `bench.cost_rates` timed give
its slope and what is paid in any case (launches, pooling). A sorted copy of keys and values costs
reading and writing them; an order costs its rows and its passes over keys. Attention is what was
timed, between the measured densities. Blocks of other sizes cost what `bench.choice.tiles`
measured for them over the usual ones: attention by the density, selection by the key blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any

from ..record import FOLDER
from .choices import Choice
from .parts import BLOCK, Tile

RATES, TILES = "rates-cuda-sm90.json", "choice-tiles-cuda-sm90.json"
ITEM = 2
# Sorting rows: read to be placed, read and written in order; two outputs read, and merged.
QUERY_PASSES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Heads and length that were timed.

    Attributes:
        q_heads: Query heads.
        kv_heads: Key heads.
        head_dim: Numbers of a key.
        tokens: Rows and keys.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.q_heads} / {self.kv_heads} heads of {self.head_dim}, {self.tokens} tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """What one shape takes, in seconds.

    Attributes:
        dense: Dense attention.
        fixed: Selection without a row.
        row: Selection for each row of a block that meets every key.
        launch: What a further stage pays to begin.
        keys: Reading the keys once.
        queries: Reading the queries once.
        attend: Block-sparse attention by density.
        tiles: Its time for blocks of other sizes over that for usual ones, as densities are.
        finer: Selection for twice the key blocks, over that for usual ones.
    """

    dense: float
    fixed: float
    row: float
    launch: float
    keys: float
    queries: float
    attend: Sequence[tuple[float, float]]
    tiles: Mapping[str, float] = field(default_factory=dict)
    finer: float = 1.0

    @classmethod
    def of(cls, shape: Shape) -> Clock:
        """From `RATES`.

        Raises:
            ValueError: The shape was not timed.
        """
        content = json.loads((FOLDER / RATES).read_text())
        rows = [row for row in content["rows"] if _is_of(row, shape)]
        if not rows:
            raise ValueError(f"shape must be one that {RATES} has, got {shape}")
        rates = content["rates"]["bfloat16"]
        paid = {_rows(r["composite"]): r["p20"] for r in rows if r["stage"] == "select"}
        (few, least), (many, most) = sorted(paid.items())
        slope = (most - least) / (many - few)
        size = shape.kv_heads * shape.tokens * shape.head_dim * ITEM
        attend = {r["density"]: r["p20"] for r in rows if r["stage"] == "attend"}
        return cls(
            dense=next(r["p20"] for r in rows if r["stage"] == "dense"),
            fixed=least - few * slope,
            row=slope,
            launch=rates["select_launch"],
            keys=size / rates["bandwidth"],
            queries=size * shape.q_heads / shape.kv_heads / rates["bandwidth"],
            attend=sorted(attend.items()),
            **_tiles(shape),
        )

    def choosing(self, choice: Choice, score_rows: float, sorted_share: float = 1.0) -> float:
        """Selection, and the order and the sorted copy in so many of the layers."""
        found = self.fixed + self.row * score_rows
        found += (self.finer - 1) * (BLOCK / choice.tile.keys - 1) * (self.fixed + 4 * self.row)
        if choice.order is not None:
            order = choice.order
            # Keys and values are read and written once.
            passes = order.key_passes + 4
            rows = order.rows * BLOCK / choice.tile.rows
            found += sorted_share * (self.launch + self.row * rows + passes * self.keys)
        if choice.sorts_rows:
            found += self.launch + QUERY_PASSES * self.queries
        return found

    def attending(self, density: float, tile: Tile) -> float:
        """Between measured densities; beyond them as between the nearest two."""
        factor = 1.0 if tile == Tile() else self.tiles.get(str(tile), math.nan)
        pairs = list(pairwise(self.attend))
        (low, first), (high, last) = next((p for p in pairs if density <= p[1][0]), pairs[-1])
        return factor * (first + (density - low) / (high - low) * (last - first))


def _tiles(shape: Shape) -> dict[str, Any]:
    """`Clock.tiles` and `Clock.finer` of these heads, means over what was timed.

    Where selection was not timed for these heads, others at the same length stand in for it.
    """
    if not (FOLDER / TILES).is_file():
        return {}
    names = ("q_heads", "kv_heads", "head_dim")
    timed = [r for r in json.loads((FOLDER / TILES).read_text())["rows"] if "p20" in r]
    same = [r for r in timed if all(r[name] == getattr(shape, name) for name in names)]
    others = [row for row in timed if row not in same]
    own, length = ([r for r in some if r["length"] == shape.tokens] for some in (same, others))
    attend = _over_usual(own, "attend") or _over_usual(same, "attend")
    select = next(filter(None, (_over_usual(s, "select") for s in (own, same, length))), {})
    return {"tiles": attend, "finer": select.get("64x64", 1.0)}


def _over_usual(rows: Sequence[Mapping[str, Any]], stage: str) -> dict[str, float]:
    """Seconds for as many kept pairs, over those of usual blocks, by the tile."""
    rate: dict[str, list[float]] = {}
    for row in rows:
        if row["stage"] == stage:
            rate.setdefault(row["tile"], []).append(row["p20"] / row.get("density", 1.0))
    usual = rate.get(str(Tile()), [])
    return {
        tile: mean(a / b for a, b in zip(times, usual, strict=True))
        for tile, times in rate.items()
        if len(rate) > 1 and len(times) == len(usual)
    }


def operations(choice: Choice, score_rows: float) -> float:
    """Multiplications of choosing over those of dense causal attention.

    A row of every block against every key is one of 128, and one of two products.
    """
    order = 0.0 if choice.order is None else choice.order.rows * BLOCK / choice.tile.rows
    return (score_rows + order) / BLOCK / 2


def key_reads(choice: Choice) -> float:
    """Bytes of ordering and gathering, over those of the keys."""
    return 0.0 if choice.order is None else choice.order.key_passes + 4


def _rows(composite: Sequence[int]) -> float:
    """What scoring of ``(c_q, c_k, c_h, sampled_queries)`` costs, in rows."""
    q, k, heads, sampled = composite
    return (sampled + BLOCK / q / k) / heads


def _is_of(row: Mapping[str, Any], shape: Shape) -> bool:
    names = ("q_heads", "kv_heads", "head_dim")
    same = all(row.get(name) == getattr(shape, name) for name in names)
    return same and row.get("length") == shape.tokens and row["stage"] in STAGES


STAGES = ("dense", "select", "attend")
