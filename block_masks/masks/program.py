"""MaskProgram: an attention mask as a formula over positions instead of a tensor of pairs.

Symbols: B batch, Sq/Skv tokens, Tq/Tk tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .evaluation import Evaluation, number_of
from .expr import (
    KV,
    TRUE,
    Affine,
    Bool,
    Load,
    Q,
    Symbol,
    all_of,
    conjuncts,
    offset_bound,
    variable,
)
from .text import format_mask, parse_mask
from .walk import atoms, coordinates, replace_atoms


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskProgram:
    """Which keys each query row sees, the same for every head.

    Written as text such as ``(kv <= q + n0) & (t0[b, kv])``: coordinates ``b``, ``q`` and ``kv``,
    integers ``n0, n1, ...`` and entries of tensors ``t0, t1, ...``; ``+ - * //``, ``< <= ==`` and
    ``& | ~``. Every tensor is read at one token at most, never at a query and a key together.

    Attributes:
        expr: The formula.
        tensors: What ``t0, t1, ...`` stand for: bool or int64, any rank; after those, what was
            prepared of the mask (`prepared`).
        numbers: What ``n0, n1, ...`` stand for while a graph is traced; plain integers are part
            of the formula.
        batch: Batch elements B.
        q_len: Query rows Sq.
        kv_len: Keys Skv.
    """

    expr: Bool
    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()
    batch: int
    q_len: int
    kv_len: int

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        tensors: Sequence[Tensor] = (),
        numbers: Sequence[int] = (),
        batch: int,
        q_len: int,
        kv_len: int,
    ) -> MaskProgram:
        """Reads a formula; see the class for its language.

        Raises:
            ValueError: The text is no mask expression, or names what is not given.
        """
        known = tuple(number if isinstance(number, int) else None for number in numbers)
        return cls(
            expr=_parse(text, known, len(tensors)),
            tensors=tuple(tensors),
            numbers=tuple(numbers),
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
        )

    @property
    def text(self) -> str:
        """The formula as text."""
        return _facts(Same(self.expr)).text

    @property
    def named(self) -> tuple[Tensor, ...]:
        """The tensors that the formula reads."""
        return self.tensors[: _facts(Same(self.expr)).loads]

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """What a selector made of the mask once for several calls, see `Selector.prepare_mask`."""
        return self.tensors[len(self.named) :]

    @property
    def varies_in_batch(self) -> bool:
        """Whether batch elements may differ."""
        return _facts(Same(self.expr)).varies_in_batch

    def evaluate(
        self,
        b: Tensor,
        q_idx: Tensor,
        kv_idx: Tensor,
        *,
        tensors: Sequence[Tensor] | None = None,
        numbers: Sequence[Tensor | int] | None = None,
    ) -> Tensor:
        """Whether rows see keys, position by position.

        Args:
            b: Batch elements, integers; broadcastable with the others.
            q_idx: Query rows.
            kv_idx: Keys.
            tensors: In place of `tensors`, as a kernel captures them.
            numbers: In place of `numbers`.

        Returns:
            bool, the positions' broadcast shape.
        """
        run = Evaluation(
            {"b": b, "q": q_idx, "kv": kv_idx},
            self.tensors if tensors is None else tensors,
            self.numbers if numbers is None else numbers,
        )
        return run.truth(self.expr)

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which of ``rows`` sees which of ``keys``: bool [1 or B, 1, rows, keys]."""
        b = torch.arange(self.batch if self.varies_in_batch else 1, device=rows.device)
        seen = self.evaluate(b[:, None, None], rows[:, None], keys[None, :])
        return seen.expand(b.shape[0], rows.shape[0], keys.shape[0])[:, None]

    def split_causal(self) -> tuple[int | None, MaskProgram | None]:
        """Takes causality out: its offset or ``None``, and what else the mask says.

        Only an offset that leaves the last row within the keys, or 0, is one: then row ``r``
        stands at key ``r + offset``. ``None`` for the rest where nothing is left.
        """
        most = self.kv_len - self.q_len
        split = _split_causal
        if isinstance(most, int) and all(isinstance(number, int) for number in self.numbers):
            split = _split_once
        offset, rest = split(Same(self.expr), tuple(self.numbers), most)
        return offset, None if rest is None else replace(self, expr=rest)

    def holds_at(self, offset: int) -> bool:
        """Whether every row ``r`` is known to see key ``r + offset``."""
        if isinstance(offset, int):
            shift = Affine(const=offset)
        else:
            known = (i for i, number in enumerate(self.numbers) if is_known(number == offset))
            shift = next((variable(Symbol(f"n{i}")) for i in known), None)
            if shift is None:
                return False
        own = variable(Q) + shift
        at_own = replace_atoms(self.expr, lambda atom: own if atom == KV else None)
        return at_own == TRUE

    def window(self, causal_offset: int | None) -> int | None:
        """Keys that a row sees up to its own position, where a sliding window bounds them."""
        if causal_offset is None:
            return None
        bound = _window_bound(Same(self.expr))
        return None if bound is None else causal_offset + number_of(bound, self.numbers) + 1


class Same:
    """A formula as a key: its own hash is computed anew from all its parts each time.

    Args:
        expr: One that lives as long as what is remembered of it.
    """

    __slots__ = ("expr",)

    def __init__(self, expr: Bool) -> None:
        self.expr = expr

    def __hash__(self) -> int:
        return id(self.expr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.expr is other.expr


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is often asked of a formula: its text, one more than its last tensor, see `named`."""

    text: str
    loads: int
    varies_in_batch: bool


@lru_cache(maxsize=512)
def _facts(formula: Same) -> _Facts:
    loads = (atom for atom in atoms(formula.expr) if isinstance(atom, Load))
    return _Facts(
        format_mask(formula.expr),
        1 + max((int(load.source[1:]) for load in loads), default=-1),
        "b" in coordinates(formula.expr),
    )


@lru_cache(maxsize=512)
def _window_bound(formula: Same) -> Affine | None:
    """``c`` of the first part that says ``q <= kv + c``."""
    bounds = (offset_bound(part, Q, KV) for part in conjuncts(formula.expr))
    return next((bound for bound in bounds if bound is not None), None)


@lru_cache(maxsize=512)
def _parse(text: str, numbers: tuple[int | None, ...], tensors: int) -> Bool:
    """The formula with the numbers that are known, of so many tensors."""
    expr = parse_mask(text)
    for atom in atoms(expr):
        given = {Load: tensors, Symbol: len(numbers)}.get(type(atom))
        if given is not None and int(atom.source[1:]) >= given:  # type: ignore[union-attr]
            raise ValueError(
                f"mask must name tensors and numbers that are given, got {atom.source!r} "  # type: ignore[union-attr]
                f"with {tensors} tensors and {len(numbers)} numbers"
            )
    known = {
        Symbol(f"n{i}"): Affine(const=number)
        for i, number in enumerate(numbers)
        if number is not None
    }
    return replace_atoms(expr, known.get) if known else expr  # type: ignore[arg-type]


def _split_causal(
    formula: Same, numbers: tuple[int, ...], most: int
) -> tuple[int | None, Bool | None]:
    """`MaskProgram.split_causal`, where an offset is at most so many."""
    offset, rest = None, []
    for part in conjuncts(formula.expr):
        bound = offset_bound(part, KV, Q)
        if bound is not None and offset is None:
            number = number_of(bound, numbers)
            if is_known(number == 0) or (is_known(number >= 0) and is_known(number <= most)):
                offset = number
                continue
        rest.append(part)
    return offset, all_of(rest) if rest else None


_split_once = lru_cache(maxsize=512)(_split_causal)


def is_known(condition: object) -> bool:
    """Whether a comparison of lengths holds; becomes a guard of the graph that is traced."""
    return condition if isinstance(condition, bool) else guard_or_false(condition)  # type: ignore[arg-type]
