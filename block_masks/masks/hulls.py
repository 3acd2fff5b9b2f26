"""The run of keys between the first and the last one that a row sees of a part of a mask.

Symbols: B batch, Sq/Skv tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .evaluation import Evaluation
from .expr import KV, Affine, And, Bool, Compare, Or, all_of, variable
from .program import MaskProgram
from .tiles import token_values
from .walk import coordinates

# Which end of a run a part sets: "kv <= e" the last key, "kv >= e" the first.
LAST, FIRST, NEITHER = 1, -1, 0


@dataclass(frozen=True, slots=True)
class Hull:
    """Per row the run of keys that holds all that it sees.

    Attributes:
        first: int64 [1 or B, 1 or Sq], the first key; it may lie after ``last``.
        last: int64 [1 or B, 1 or Sq], the last key; either may lie outside of the keys.
        gaps: bool [1 or B, 1 or Sq], rows that may not see some key between.
    """

    first: Tensor
    last: Tensor
    gaps: Tensor

    def __and__(self, other: Hull) -> Hull:
        first, last = torch.maximum(self.first, other.first), torch.minimum(self.last, other.last)
        return Hull(first, last, self.gaps | other.gaps)

    def __or__(self, other: Hull) -> Hull:
        alone, absent = other.first > other.last, self.first > self.last
        first, last = torch.minimum(self.first, other.first), torch.maximum(self.last, other.last)
        start, stop = torch.maximum(self.first, other.first), torch.minimum(self.last, other.last)
        gaps = self.gaps | other.gaps | (start > stop + 1)
        return Hull(
            torch.where(alone, self.first, torch.where(absent, other.first, first)),
            torch.where(alone, self.last, torch.where(absent, other.last, last)),
            torch.where(alone, self.gaps, torch.where(absent, other.gaps, gaps)),
        )


def bound_side(part: Bool) -> int | None:
    """The end of a row's run that a part sets, and nothing else; ``None`` if it says more.

    `LAST` for ``kv <= e`` and what is made of such parts alone, `FIRST` for ``kv >= e`` likewise,
    `NEITHER` for what knows no key.
    """
    if "kv" not in coordinates(part):
        return NEITHER
    match part:
        case Compare():
            bound = key_bound(part)
            return None if bound is None else bound[0]
        case And() | Or():
            sides = {bound_side(inner) for inner in part.parts} - {NEITHER}
            return sides.pop() if len(sides) == 1 else None
        case _:
            return None


def bound_value(program: MaskProgram, part: Bool, side: int, row: Tensor) -> Tensor:
    """The key that ends each row's run, for a part of that `bound_side`.

    Args:
        program: What the part is of.
        part: A part of it.
        side: `LAST` or `FIRST`.
        row: int64 [1, Sq], the rows.

    Returns:
        int64 [1 or B, 1 or Sq]; it may lie outside of the keys.
    """
    if "kv" not in coordinates(part):
        sees, _ = token_values(program, part, row.device)
        whole, none = (program.kv_len - 1, -1) if side == LAST else (0, program.kv_len)
        return torch.where(sees, whole, none)
    if isinstance(part, Compare):
        bound = key_bound(part)
        assert bound is not None
        return integer_at(program, bound[1], row)
    assert isinstance(part, (And, Or))
    widest = torch.maximum if (side == LAST) == isinstance(part, Or) else torch.minimum
    return reduce(widest, (bound_value(program, inner, side, row) for inner in part.parts))


def has_hull(part: Bool) -> bool:
    """Whether `hull_of` knows a part, and its run is not known to have gaps."""
    if "kv" not in coordinates(part) or "q" not in coordinates(part):
        return True
    if bound_side(part) is not None:
        return True
    match part:
        case Compare(op="=="):
            return sides_of_equality(part) is not None
        case And():
            return all(has_hull(inner) for inner in part.parts)
        case Or():
            # A run from the first key on and one near the row's own position leave a gap.
            from_start = any(
                bound_side(inner) == LAST or "q" not in coordinates(inner) for inner in part.parts
            )
            apart = from_start and any(_sets_first(inner) for inner in part.parts)
            return not apart and all(has_hull(inner) for inner in part.parts)
        case _:
            return False


def hull_of(program: MaskProgram, part: Bool, row: Tensor) -> Hull:
    """The keys that a part of a mask lets rows see.

    Args:
        program: What the part is of.
        part: A part of it that `has_hull`.
        row: int64 [1, Sq], the rows.
    """
    side = bound_side(part)
    whole = row.new_zeros((1, 1)), row.new_full((1, 1), program.kv_len - 1)
    none = row.new_zeros((1, 1), dtype=torch.bool)
    if side is not None:
        # What knows no key sets the last one as well as the first.
        value = bound_value(program, part, side or LAST, row)
        return Hull(value, whole[1], none) if side == FIRST else Hull(whole[0], value, none)
    if "q" not in coordinates(part):
        seen, _ = token_values(program, part, row.device)
        return _hull_of_keys(seen)
    if isinstance(part, Compare):
        return _hull_of_equals(program, part, row)
    if isinstance(part, And):
        return _hull_of_all(program, part, row)
    assert isinstance(part, Or)
    return reduce(Hull.__or__, (hull_of(program, inner, row) for inner in part.parts))


def integer_at(program: MaskProgram, value: Affine, token: Tensor) -> Tensor:
    """An integer at query rows or at keys, int64 [1, S]: int64 [1 or B, S]."""
    batch = program.batch if "b" in coordinates(value) else 1
    b = torch.arange(batch, device=token.device)[:, None]
    run = Evaluation({"b": b, "q": token, "kv": token}, program.tensors, program.numbers)
    return run.integer(value).expand(batch, token.shape[1]).long()


def _hull_of_keys(seen: Tensor) -> Hull:
    """The run of keys that every row sees the same of: bool [1 or B, Skv]."""
    key = torch.arange(seen.shape[1], device=seen.device)
    first = torch.where(seen, key, seen.shape[1]).amin(-1, keepdim=True)
    last = torch.where(seen, key, -1).amax(-1, keepdim=True)
    return Hull(first, last, seen.sum(-1, keepdim=True) < last - first + 1)


def _hull_of_all(program: MaskProgram, part: And, row: Tensor) -> Hull:
    of_keys = [inner for inner in part.parts if "q" not in coordinates(inner)]
    rest = [inner for inner in part.parts if "q" in coordinates(inner)]
    equalities = [i for i in rest if isinstance(i, Compare) and bound_side(i) is None]
    if not of_keys or not equalities:
        return reduce(Hull.__and__, (hull_of(program, inner, row) for inner in part.parts))
    # One run of an id, although keys of some kind lie in many.
    seen, _ = token_values(program, all_of(of_keys), row.device)
    hulls = [_hull_of_equals(program, inner, row, seen) for inner in equalities]
    hulls += [hull_of(program, inner, row) for inner in rest if inner not in equalities]
    return reduce(Hull.__and__, hulls)


def _hull_of_equals(
    program: MaskProgram, part: Compare, row: Tensor, seen: Tensor | None = None
) -> Hull:
    """The run between the first and the last key whose id is the row's, of those that are seen."""
    sides = sides_of_equality(part)
    assert sides is not None
    of_row = integer_at(program, sides[0], row)
    of_key = integer_at(program, sides[1], torch.arange(program.kv_len, device=row.device)[None])
    if seen is not None:
        # An id that no row has.
        of_key = of_key.masked_fill(~seen, torch.iinfo(torch.int64).max)
    batch = max(of_row.shape[0], of_key.shape[0])
    of_row = of_row.expand(batch, -1).contiguous()
    # Among equal ids keys stay in their order.
    ids, key = of_key.expand(batch, -1).contiguous().sort(dim=-1, stable=True)
    start, stop = (torch.searchsorted(ids, of_row, right=right) for right in (False, True))
    first = key.gather(1, start.clamp(max=program.kv_len - 1))
    last = key.gather(1, (stop - 1).clamp(min=0))
    last = torch.where(stop > start, last, first - 1)
    return Hull(first, last, stop - start < last - first + 1)


def key_bound(part: Compare) -> tuple[int, Affine] | None:
    """``(LAST, e)`` of ``kv <= e`` or ``(FIRST, e)`` of ``kv >= e``, where ``e`` knows no key."""
    if part.op == "==":
        return None
    difference = part.difference
    factor = difference.factor(KV)
    if factor not in (LAST, FIRST):
        return None
    rest = difference - variable(KV) * factor
    if "kv" in coordinates(rest):
        return None
    return factor, rest * -factor


def sides_of_equality(part: Compare) -> tuple[Affine, Affine] | None:
    """``x`` and ``y`` of ``x == y``, where ``x`` knows no key and ``y`` no query row."""
    keys = Affine(tuple((a, f) for a, f in part.difference.terms if "kv" in _names(a)))
    return None if "q" in coordinates(keys) else (keys - part.difference, keys)


def _names(atom: object) -> set[str]:
    return coordinates(variable(atom))  # type: ignore[arg-type]


def _sets_first(part: Bool) -> bool:
    """Whether a part, or one that it is made of, sets the first key of a run."""
    if isinstance(part, (And, Or)):
        return any(_sets_first(inner) for inner in part.parts)
    return bound_side(part) == FIRST
