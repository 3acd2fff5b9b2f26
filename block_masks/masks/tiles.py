"""What a mask program says about tiles, without looking at pairs.

Symbols: B batch, Sq/Skv tokens, Tq/Tk tiles, Nk key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .evaluation import number_of
from .expr import (
    Affine,
    And,
    Bool,
    Compare,
    Constant,
    FloorDiv,
    Load,
    Not,
    Or,
    Symbol,
    Truth,
    variable,
)
from .program import MaskProgram
from .walk import coordinates

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of query rows and keys, counted from 0; the last ones may be ragged or empty.

    Attributes:
        q_size: Query rows per tile.
        q_count: Tiles of query rows Tq.
        kv_size: Keys per tile.
        kv_count: Tiles of keys Tk.
    """

    q_size: int
    q_count: int
    kv_size: int
    kv_count: int


def tile_bounds(program: MaskProgram, tiles: Tiles, device: torch.device) -> Bounds:
    """Whether tiles may hold a visible pair, and whether all their pairs must be visible.

    Sound for every mask: ``may`` is False only where nothing is visible, ``must`` is True only
    where everything is. An empty tile is judged as if it held the last token.

    Returns:
        ``may`` and ``must``, bool [1 or B, 1, Tq, Tk].
    """
    may, must = _TileBounds(program, tiles, device).truth(program.expr)
    shape = (program.batch if program.varies_in_batch else 1, tiles.q_count, tiles.kv_count)
    return may.expand(shape)[:, None], must.expand(shape)[:, None]


@dataclass(frozen=True, slots=True)
class _TileBounds:
    """Three-valued logic over tiles; everything has shape [1 or B, 1 or Tq, 1 or Tk]."""

    program: MaskProgram
    tiles: Tiles
    device: torch.device

    def truth(self, value: Bool) -> Bounds:
        match value:
            case Constant():
                same = torch.full((1, 1, 1), value.value, device=self.device)
                return same, same
            case Truth():
                tokens, along = self.tokens(value.load)
                tiled = self.tiled(tokens, along)
                return tiled.any(-1), tiled.all(-1)
            case Compare():
                return self.compare(value)
            case Not():
                may, must = self.truth(value.of)
                return ~must, ~may
            case And() | Or():
                may, must = self.truth(value.parts[0])
                for part in value.parts[1:]:
                    other = self.truth(part)
                    if isinstance(value, And):
                        may, must = may & other[0], must & other[1]
                    else:
                        may, must = may | other[0], must | other[1]
                return may, must

    def compare(self, value: Compare) -> Bounds:
        (low, high), (other_low, other_high) = self.integer(value.left), self.integer(value.right)
        if value.op == "<":
            return low < other_high, high < other_low
        if value.op == "<=":
            return low <= other_high, high <= other_low
        may = (low <= other_high) & (other_low <= high)
        return may, (low == high) & (other_low == other_high) & (low == other_low)

    def integer(self, value: Affine) -> Bounds:
        constant = torch.full((1, 1, 1), value.const, dtype=torch.int64, device=self.device)
        low, high = constant, constant
        for atom, factor in value.terms:
            first, last = self.atom(atom)
            if factor < 0:
                first, last = last, first
            low, high = low + first * factor, high + last * factor
        return low, high

    def atom(self, atom: object) -> Bounds:
        match atom:
            case Symbol():
                value = torch.full((1, 1, 1), 0, dtype=torch.int64, device=self.device)
                value = value + number_of(variable(atom), self.program.numbers)
                return value, value
            case FloorDiv():
                low, high = self.integer(atom.numerator)
                return low // atom.divisor, high // atom.divisor
            case Load():
                tokens, along = self.tokens(atom)
                tiled = self.tiled(tokens, along)
                return tiled.amin(-1), tiled.amax(-1)
            case _:
                name: str = atom.name  # type: ignore[attr-defined]
                if name == "b":
                    b = torch.arange(self.program.batch, device=self.device)[:, None, None]
                    return b, b
                size, count, length, dim = self.along(name)
                first = torch.arange(count, device=self.device) * size
                last = (first + size - 1).clamp(max=length - 1)
                first = first.clamp(max=length - 1)
                shape = (1, -1, 1) if dim == 1 else (1, 1, -1)
                return first.view(shape), last.view(shape)

    def along(self, name: str) -> tuple[int, int, int, int]:
        """Tile size, tile count, tokens and dimension of a coordinate."""
        if name == "q":
            return self.tiles.q_size, self.tiles.q_count, self.program.q_len, 1
        return self.tiles.kv_size, self.tiles.kv_count, self.program.kv_len, 2

    def tokens(self, load: Load) -> tuple[Tensor, str | None]:
        """Entries by batch element and token, [1 or B, 1 or S], and along which coordinate."""
        return token_values(self.program, Truth(load), self.device)

    def tiled(self, tokens: Tensor, name: str | None) -> Tensor:
        """[1 or B, 1 or S] as [1 or B, 1 or Tq, 1 or Tk, tile]; ragged tiles repeat a token."""
        if name is None:
            return tokens[:, :, None, None]
        size, count, length, dim = self.along(name)
        index = torch.arange(size * count, device=self.device).clamp(max=length - 1)
        tiled = tokens[:, index].view(tokens.shape[0], count, size)
        return tiled[:, :, None] if dim == 1 else tiled[:, None]


def token_values(
    program: MaskProgram, value: Bool, device: torch.device
) -> tuple[Tensor, str | None]:
    """A value that depends on one token at most, for every token.

    Returns:
        [1 or B, 1 or S], and the coordinate that S stands for.
    """
    names = coordinates(value)
    name = next((n for n in ("q", "kv") if n in names), None)
    length = 1 if name is None else program.q_len if name == "q" else program.kv_len
    batch = program.batch if "b" in names else 1
    b = torch.arange(batch, device=device)[:, None]
    token = torch.arange(length, device=device)[None, :]
    values = replace(program, expr=value).evaluate(b, token, token)
    return values.expand(batch, length), name
