"""What a mask program says about tiles and rows, without looking at pairs.

Symbols: B batch, Sq/Skv tokens, Tq/Tk tiles, Nk key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .mask_expr import (
    KV,
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
    all_of,
    conjuncts,
    coordinates,
    variable,
)
from .mask_program import Evaluation, MaskProgram
from .pinning import pin

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
                value = value + self.program.number(variable(atom))
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


@dataclass(frozen=True, slots=True)
class RowSpans:
    """A mask as spans of keys: each row sees the valid keys between two positions, and no more.

    Attributes:
        first: int64 [1 or B, Sq], the first key of each row's span.
        last: int64 [1 or B, Sq], the last one; before ``first`` where the span is empty.
        key_valid: bool [1 or B, Skv], keys that some row may see.
        rest: What the spans do not say, or ``None`` where they say everything.
    """

    first: Tensor
    last: Tensor
    key_valid: Tensor
    rest: MaskProgram | None

    def seen_between(self, start: Tensor, stop: Tensor) -> Tensor:
        """Whether a row sees a key in [start, stop), both int64 [T]: bool [1 or B, Sq, T]."""
        low = torch.maximum(self.first[..., None], start)
        high = torch.minimum(self.last[..., None] + 1, stop)
        high = torch.maximum(low, high)
        before = self.key_valid.cumsum(-1)
        batch = max(before.shape[0], low.shape[0], high.shape[0])
        before, low, high = (x.expand(batch, *x.shape[1:]) for x in (before, low, high))

        def count(position: Tensor) -> Tensor:
            """Valid keys before a position."""
            index = (position - 1).clamp(0, before.shape[1] - 1)
            found = before.gather(1, index.flatten(1)).view(index.shape)
            return found.masked_fill(position <= 0, 0)

        return count(high) > count(low)

    def padded(self, rows: int) -> RowSpans:
        """The same for ``rows`` query rows; those behind the last one see nothing."""
        row = torch.arange(rows, device=self.first.device)
        index = row.clamp(max=self.first.shape[1] - 1)
        last = self.last[:, index].masked_fill(row >= self.first.shape[1], -1)
        return replace(self, first=self.first[:, index], last=last)


def row_spans(program: MaskProgram, causal_offset: int | None, device: torch.device) -> RowSpans:
    """The part of a mask, and of causality beside it, that spans of keys express exactly."""
    row = torch.arange(program.q_len, device=device)[None, :]
    first = torch.zeros_like(row)
    last = torch.full_like(row, program.kv_len - 1)
    if causal_offset is not None:
        last = torch.minimum(last, row + causal_offset)
    key_valid = torch.ones((1, program.kv_len), dtype=torch.bool, device=device)
    rest: list[Bool] = []
    for part in conjuncts(program.expr):
        names = coordinates(part)
        if "kv" not in names:
            sees, _ = token_values(program, part, device)
            last = torch.where(sees, last, -1)
        elif "q" not in names:
            key_valid = key_valid & token_values(program, part, device)[0]
        elif (bound := _key_bound(part)) is not None:
            factor, value = bound
            position = _integer(program, value, row)
            if factor > 0:
                last = torch.minimum(last, position)
            else:
                first = torch.maximum(first, position)
        else:
            rest.append(part)
    left = replace(program, expr=all_of(rest)) if rest else None
    (key_valid,) = pin([key_valid])
    last = torch.where(last < first, first - 1, last)
    return RowSpans(first, last, key_valid, left)


def _key_bound(part: Bool) -> tuple[int, Affine] | None:
    """``(1, e)`` of ``kv <= e`` or ``(-1, e)`` of ``kv >= e``, where ``e`` knows no key."""
    if not isinstance(part, Compare) or part.op == "==":
        return None
    difference = part.difference
    factor = difference.factor(KV)
    if factor not in (1, -1):
        return None
    rest = difference - variable(KV) * factor
    if "kv" in coordinates(rest):
        return None
    return factor, rest * -factor


def _integer(program: MaskProgram, value: Affine, row: Tensor) -> Tensor:
    """An integer that depends on no key, for every row: [1 or B, Sq]."""
    batch = program.batch if "b" in coordinates(value) else 1
    b = torch.arange(batch, device=row.device)[:, None]
    run = Evaluation({"b": b, "q": row, "kv": row}, program.tensors, program.numbers)
    return run.integer(value).expand(batch, row.shape[1])
