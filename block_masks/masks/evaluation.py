"""Mask expressions evaluated at positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expr import Affine, And, Bool, Compare, Constant, FloorDiv, Load, Not, Or, Symbol, Truth

Position = dict[str, Tensor]
Operation = Callable[[Tensor, Any], Tensor]
_PLAIN: dict[str, Operation] = {"<": torch.lt, "<=": torch.le, "==": torch.eq}
# With the sides changed.
_MIRRORED: dict[str, Operation] = {"<": torch.gt, "<=": torch.ge, "==": torch.eq}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of expressions at given positions.

    Attributes:
        position: Integers ``b``, ``q`` and ``kv``, broadcastable with one another.
        tensors: What ``t0, t1, ...`` stand for.
        numbers: What ``n0, n1, ...`` stand for.
    """

    position: Position
    tensors: Sequence[Tensor]
    numbers: Sequence[Tensor | int]

    def truth(self, value: Bool) -> Tensor:
        """A truth at every position: bool, broadcastable with the positions."""
        match value:
            case Constant():
                return torch.full_like(self.position["q"], value.value, dtype=torch.bool)
            case Truth():
                return self.load(value.load)
            case Compare():
                return self.compare(value)
            case Not():
                return ~self.truth(value.of)
            case And() | Or():
                result = self.truth(value.parts[0])
                for part in value.parts[1:]:
                    other = self.truth(part)
                    result = result & other if isinstance(value, And) else result | other
                return result

    def compare(self, value: Compare) -> Tensor:
        """A comparison at every position; a number as one side stays a number.

        As a tensor it would be cast to the other side's dtype, for which Inductor's CuTe code
        (torch 2.11 to 2.13) writes ``1.to(...)``.
        """
        left, right = value.left, value.right
        if left.terms and not right.terms:
            entry = self.integer(left)
            # Narrow integers do not compare with numbers that they cannot hold.
            if entry.dtype in (torch.int32, torch.int64):
                return _PLAIN[value.op](entry, right.const)
        if right.terms and not left.terms:
            entry = self.integer(right)
            if entry.dtype in (torch.int32, torch.int64):
                return _MIRRORED[value.op](entry, left.const)
        return _PLAIN[value.op](self.integer(left), self.integer(right))

    def integer(self, value: Affine) -> Tensor:
        """An integer at every position."""
        total = None
        for atom, factor in value.terms:
            match atom:
                case Load():
                    entry = self.load(atom)
                case FloorDiv():
                    entry = self.integer(atom.numerator) // atom.divisor
                case Symbol():
                    entry = self.numbers[int(atom.source[1:])]  # type: ignore[assignment]
                case _:
                    entry = self.position[atom.name]
            entry = entry if factor == 1 else entry * factor
            total = entry if total is None else total + entry
        if total is None:
            return torch.full_like(self.position["q"], value.const)
        total = total + value.const if value.const else total
        # Numbers alone stay plain: they must still compare as a tensor.
        return total if isinstance(total, Tensor) else self.position["q"] * 0 + total

    def load(self, load: Load) -> Tensor:
        """A tensor's entry at every position, in the tensor's dtype."""
        tensor = self.tensors[int(load.source[1:])]
        if not load.index:
            return tensor
        zero = torch.zeros_like(self.position["q"])
        index = tuple(zero if not i.terms and not i.const else self.integer(i) for i in load.index)
        return tensor[index]


def number_of(value: Affine, numbers: Sequence[int]) -> int:
    """The value of an expression of only ``n0, n1, ...``; symbolic where they are."""
    total = value.const
    for atom, factor in value.terms:
        assert isinstance(atom, Symbol)
        total = total + factor * numbers[int(atom.source[1:])]
    return total
