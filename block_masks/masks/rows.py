"""What a mask program says about rows, as spans of keys.

Symbols: B batch, Sq/Skv tokens, T spans asked about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..strides import fix_strides
from .expr import KV, Affine, Bool, Q, all_of, conjuncts, offset_bound
from .hulls import LAST, bound_side, bound_value, has_hull
from .program import MaskProgram, Same
from .text import parse_mask
from .tiles import token_values
from .walk import coordinates


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
            found = before[:, None].expand(-1, index.shape[1], -1).gather(2, index)
            return found.masked_fill(position <= 0, 0)

        return count(high) > count(low)

    def padded(self, rows: int) -> RowSpans:
        """The same for ``rows`` query rows; those after the last one see nothing."""
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
        elif (side := bound_side(part)) is not None:
            key = bound_value(program, part, side, row)
            if side == LAST:
                last = torch.minimum(last, key)
            else:
                first = torch.maximum(first, key)
        else:
            rest.append(part)
    left = replace(program, expr=all_of(rest)) if rest else None
    (key_valid,) = fix_strides([key_valid])
    last = torch.where(last < first, first - 1, last)
    return RowSpans(first, last, key_valid, left)


def has_intervals(expr: Bool) -> bool:
    """Whether runs of keys, of which each is valid or not for all rows, may say the whole mask.

    They do unless documents, images or a prefix that it reads from tensors lie in pieces.
    """
    return _has_intervals(Same(expr))


@lru_cache(maxsize=512)
def _has_intervals(formula: Same) -> bool:
    return all(has_hull(part) for part in conjuncts(formula.expr))


def says_intervals(text: str) -> bool:
    """`has_intervals` of a formula as text."""
    return has_intervals(parse_mask(text))


def says_causality(text: str) -> tuple[bool, bool]:
    """Whether a formula says that row r sees keys up to r; or up to r + c, of another c."""
    bounds = (offset_bound(part, KV, Q) for part in conjuncts(parse_mask(text)))
    found = [bound == Affine() for bound in bounds if bound is not None]
    return any(found), bool(found) and not any(found)
