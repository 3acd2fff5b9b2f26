"""Rows of a call, and the keys that they see in the order in which blocks are cut from them.

Symbols: Hq/Hkv heads, G = Hq / Hkv, S tokens, R rows of a part, E keys that it sees, D head_dim,
Nq = R / rows and Nk = E / keys blocks of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What is kept or dropped whole.

    Attributes:
        rows: Queries of a block.
        keys: Keys of a block.
    """

    rows: int = BLOCK
    keys: int = BLOCK

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}"

    @property
    def part(self) -> float:
        """Of the pairs of a usual block."""
        return self.rows * self.keys / BLOCK**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One causal attention call of one sequence.

    Attributes:
        query: [Hkv, G, S, D].
        key: [Hkv, S, D].
        value: [Hkv, S, D].
        scale: Factor on the logits.
        tile: Its blocks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    tile: Tile = Tile()

    @property
    def tokens(self) -> int:
        return self.key.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive rows, and the keys up to the last of them.

    The keys from ``first`` on, the rows' own, are in natural order; those before may be in any.

    Attributes:
        query: [Hkv, G, R, D].
        key: [Hkv, E, D].
        first: Position of the first row; ``E - R``.
        scale: Factor on the logits.
        sorted_rows: Rows by their places after ``first``, int64 [Hkv, G, R]; ``None`` where they
            are in order. ``query`` is sorted already.
        tile: Its blocks.
    """

    query: Tensor
    key: Tensor
    first: int
    scale: float
    sorted_rows: Tensor | None = None
    tile: Tile = Tile()

    @property
    def positions(self) -> Tensor:
        """Of the rows: int64 [Hkv or 1, G or 1, R]."""
        if self.sorted_rows is not None:
            return self.sorted_rows + self.first
        return torch.arange(self.rows, device=self.key.device)[None, None] + self.first

    @property
    def rows(self) -> int:
        return self.query.shape[2]

    @property
    def row_blocks(self) -> int:
        return self.rows // self.tile.rows

    @property
    def key_blocks(self) -> int:
        return self.key.shape[1] // self.tile.keys

    @property
    def visible(self) -> Tensor:
        """Which blocks of keys a block of rows sees: bool [Nq, Nk]."""
        device = self.key.device
        last = (torch.arange(self.row_blocks, device=device) + 1) * self.tile.rows + self.first - 1
        return torch.arange(self.key_blocks, device=device) * self.tile.keys <= last[:, None]

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled products in float32, [Hkv, G, n, m] of [Hkv, G, n, D] and [Hkv, m, D]."""
        heads, group, count, width = queries.shape
        flat = queries.reshape(heads, group * count, width)
        if flat.dtype == torch.float32 or flat.device.type != "cuda":
            found = flat.float() @ keys.float().mT
        else:
            found = torch.bmm(flat, keys.mT, out_dtype=torch.float32)
        return found.view(heads, group, count, -1).mul_(self.scale)

    def exact_logits(self, rows: Tensor) -> Tensor:
        """Of rows, int64 [n], against every key: float32 [Hkv, G, n, E], -inf where hidden."""
        found = self.logits(self.query[:, :, rows], self.key)
        position = torch.arange(self.key.shape[1], device=self.key.device)
        return found.masked_fill_(position > self.positions[:, :, rows, None], -math.inf)

    def sampled(self, count: float) -> Tensor:
        """``count`` rows of every block, the last of it included: int64 [Nq * count].

        Below 1 it is a row of every ``1 / count`` blocks.
        """
        step = int(self.tile.rows / count)
        return torch.arange(step - 1, self.rows, step, device=self.key.device)
