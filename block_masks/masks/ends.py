"""A mask of intervals as what a kernel reads of it: few tensors, and most of them given.

Symbols: B batch, Sq/Skv tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from .evaluation import number_of
from .expr import KV, Affine, B, Bool, Compare, Load, Q, Truth, conjuncts, offset_bound, variable
from .hulls import (
    FIRST,
    LAST,
    Hull,
    bound_side,
    bound_value,
    hull_of,
    integer_at,
    key_bound,
    sides_of_equality,
)
from .program import MaskProgram
from .tiles import token_values
from .walk import coordinates

# Where a tensor is read that has an entry for each token of a batch element, or of all alike.
OF_BATCH = {along: (variable(B), variable(along)) for along in (Q, KV)}
OF_ALL = {along: (variable(along),) for along in (Q, KV)}


@dataclass(frozen=True, slots=True, eq=False)
class RowEnds:
    """What keeps rows from keys; ``None`` for nothing of that kind.

    A row sees the valid keys that none of these hides. Integers are int64; tensors have a row for
    each batch element or one for all, and an entry for each token or one for all.

    Attributes:
        last_offset: Row ``r`` sees no key after ``r + last_offset``.
        first_offset: Nor one before ``r + first_offset``.
        lasts: Nor one after its entry: [1 or B, 1 or Sq].
        firsts: Nor one before its entry.
        sees: bool, rows that see keys at all.
        gaps: bool, rows that may not see all keys between.
        row_ids: Nor keys of another id than its own.
        ids: The ids of keys in order: [1 or B, Skv], contiguous.
        order: The keys that have them, those of one id in order; contiguous.
        key_valid: bool [1 or B, 1 or Skv].
    """

    last_offset: int | None = None
    first_offset: int | None = None
    lasts: Tensor | None = None
    firsts: Tensor | None = None
    sees: Tensor | None = None
    gaps: Tensor | None = None
    row_ids: Tensor | None = None
    ids: Tensor | None = None
    order: Tensor | None = None
    key_valid: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        found = (getattr(self, name) for name in self.__dataclass_fields__)
        return [value for value in found if isinstance(value, Tensor)]

    @property
    def kind(self) -> tuple[object, ...]:
        """What it is beside the tensors."""
        given = (getattr(self, name) for name in self.__dataclass_fields__)
        return tuple(True if isinstance(value, Tensor) else value for value in given)


@dataclass(frozen=True, slots=True)
class EndsPlan:
    """The parts of a formula by what they do to rows, see `RowEnds`.

    Attributes:
        expr: The formula.
        varies: Whether batch elements may differ.
        last_offset: See `RowEnds`.
        first_offset: See `RowEnds`.
        lasts: Parts that set the last key, each with that key where the part is one comparison.
        firsts: Parts that set the first one, likewise.
        rows: Parts that know no key.
        keys: Parts that know no row.
        equality: Ids of rows and of keys.
        hulls: All others.
    """

    expr: Bool
    varies: bool
    last_offset: int | None
    first_offset: int | None
    lasts: tuple[tuple[Bool, Affine | None], ...]
    firsts: tuple[tuple[Bool, Affine | None], ...]
    rows: tuple[Bool, ...]
    keys: tuple[Bool, ...]
    equality: tuple[Affine, Affine] | None
    hulls: tuple[Bool, ...]

    def ends(
        self,
        tensors: Sequence[Tensor],
        *,
        batch: int,
        q_len: int,
        kv_len: int,
        device: torch.device,
    ) -> RowEnds:
        """The ends under a mask that reads these tensors."""
        run = _Ends(
            MaskProgram(
                expr=self.expr, tensors=tuple(tensors), batch=batch, q_len=q_len, kv_len=kv_len
            ),
            device,
        )
        lasts = [run.bound(*last, LAST) for last in self.lasts]
        firsts = [run.bound(*first, FIRST) for first in self.firsts]
        gaps = None
        if self.hulls:
            row = torch.arange(q_len, device=device)[None]
            hull = reduce(Hull.__and__, (hull_of(run.program, p, row) for p in self.hulls))
            lasts, firsts, gaps = [*lasts, hull.last], [*firsts, hull.first], hull.gaps
        row_ids = ids = order = None
        if self.equality is not None:
            row_ids, of_key = (
                run.integer(side, coordinate)
                for side, coordinate in zip(self.equality, (Q, KV), strict=True)
            )
            # Among equal ids keys stay in their order.
            ids, order = (t.contiguous() for t in of_key.sort(dim=-1, stable=True))
        return RowEnds(
            last_offset=self.last_offset,
            first_offset=self.first_offset,
            lasts=reduce(torch.minimum, lasts) if lasts else None,
            firsts=reduce(torch.maximum, firsts) if firsts else None,
            sees=run.all_of(self.rows, Q),
            gaps=gaps,
            row_ids=row_ids,
            ids=ids,
            order=order,
            key_valid=run.all_of(self.keys, KV),
        )


@lru_cache(maxsize=256)
def ends_plan(
    text: str, numbers: tuple[int, ...], tensors: int, causal_offset: int | None
) -> EndsPlan:
    """How the ends of rows follow from a formula, and from causality beside it.

    Args:
        text: The formula, see `MaskProgram`; one that `has_intervals`.
        numbers: What ``n0, n1, ...`` stand for.
        tensors: How many are given.
        causal_offset: That of the rows, where they are causal beside it.
    """
    nothing: Any = [None] * tensors
    program = MaskProgram.parse(text, tensors=nothing, numbers=numbers, batch=1, q_len=1, kv_len=1)
    last, first = [] if causal_offset is None else [causal_offset], []
    parts: dict[str, list[Any]] = {"lasts": [], "firsts": [], "rows": [], "keys": [], "hulls": []}
    equality = None
    for part in conjuncts(program.expr):
        names = coordinates(part)
        if "kv" not in names:
            parts["rows"].append(part)
        elif "q" not in names:
            parts["keys"].append(part)
        elif (bound := offset_bound(part, KV, Q)) is not None:
            last.append(number_of(bound, ()))
        elif (bound := offset_bound(part, Q, KV)) is not None:
            first.append(-number_of(bound, ()))
        elif (side := bound_side(part)) is not None:
            found = key_bound(part) if isinstance(part, Compare) else None
            end = None if found is None else found[1]
            parts["lasts" if side == LAST else "firsts"].append((part, end))
        elif equality is None and isinstance(part, Compare):
            equality = sides_of_equality(part)
            if equality is not None and all(factor < 0 for _, factor in equality[1].terms):
                # Entries as they are, where both sides hold them negated.
                equality = -equality[0], -equality[1]
        else:
            parts["hulls"].append(part)
    return EndsPlan(
        expr=program.expr,
        varies=program.varies_in_batch,
        last_offset=min(last, default=None),
        first_offset=max(first, default=None),
        equality=equality,
        **{name: tuple(found) for name, found in parts.items()},
    )


@dataclass(frozen=True, slots=True)
class _Ends:
    """Values of a formula's parts, as views of the tensors that it reads where they are those."""

    program: MaskProgram
    device: torch.device

    def bound(self, part: Bool, end: Affine | None, side: int) -> Tensor:
        """The key that ends each row's run: int64 [1 or B, 1 or Sq]."""
        if end is not None:
            return self.integer(end, Q)
        row = torch.arange(self.program.q_len, device=self.device)[None]
        return bound_value(self.program, part, side, row)

    def integer(self, value: Affine, along: Any) -> Tensor:
        """An integer at query rows or keys: int64 [1 or B, 1 or S]."""
        if len(value.terms) == 1 and value.terms[0][1] == 1 and not value.const:
            found = self._view(value.terms[0][0], along, torch.int64)
            if found is not None:
                return found
        length = self.program.q_len if along == Q else self.program.kv_len
        return integer_at(self.program, value, torch.arange(length, device=self.device)[None])

    def all_of(self, parts: tuple[Bool, ...], along: Any) -> Tensor | None:
        """Whether all parts hold: bool [1 or B, 1 or S]; ``None`` of none."""
        if not parts:
            return None
        return reduce(torch.logical_and, (self._truth(part, along) for part in parts))

    def _truth(self, part: Bool, along: Any) -> Tensor:
        found = None
        if isinstance(part, Truth):
            found = self._view(part.load, along, torch.bool)
        return token_values(self.program, part, self.device)[0] if found is None else found

    def _view(self, atom: object, along: Any, dtype: torch.dtype) -> Tensor | None:
        """The entries of a tensor that is read at its own places; ``None`` of anything else."""
        if not isinstance(atom, Load):
            return None
        tensor = self.program.tensors[int(atom.source[1:])]
        length = self.program.q_len if along == Q else self.program.kv_len
        batched = len(atom.index) == len(OF_BATCH[along])
        shape = (self.program.batch, length) if batched else (length,)
        at = OF_BATCH[along] if batched else OF_ALL[along]
        if tensor.dtype is not dtype or atom.index != at or tensor.shape != shape:
            return None
        return tensor if batched else tensor[None]
