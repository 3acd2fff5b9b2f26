"""What a mask program says about rows, as spans of keys.

Symbols: B batch, Sq/Skv tokens, T spans asked about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..strides import fix_strides
from .evaluation import Evaluation
from .expr import KV, Affine, Bool, Compare, all_of, conjuncts, variable
from .program import MaskProgram
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
            found = before.gather(1, index.flatten(1)).view(index.shape)
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
    (key_valid,) = fix_strides([key_valid])
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


def has_intervals(expr: Bool) -> bool:
    """Whether spans of keys, of which each is valid or not for all rows, say the whole mask."""
    parts = [part for part in conjuncts(expr) if {"q", "kv"} <= coordinates(part)]
    return all(_key_bound(part) is not None for part in parts)


def says_intervals(text: str) -> bool:
    """`has_intervals` of a formula as text."""
    return has_intervals(parse_mask(text))
