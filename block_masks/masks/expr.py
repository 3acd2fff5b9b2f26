"""Expressions over a mask's coordinates: integers that are affine in them, and truths about these.

Coordinates are ``b`` batch element, ``q`` query row, ``kv`` key. Constructors normalise, so equal
masks that were spelled differently mostly become equal expressions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A position in the mask; never negative."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """An integer that is known when the mask is used: ``n0``, or a graph's node for it."""

    source: Any


@dataclass(frozen=True, slots=True)
class Load:
    """An entry of a tensor, ``t0[b, kv]``; the source is a name or a graph's node."""

    source: Any
    index: tuple[Affine, ...]


@dataclass(frozen=True, slots=True)
class FloorDiv:
    """``numerator // divisor`` for a positive constant divisor."""

    numerator: Affine
    divisor: int


Atom: TypeAlias = Coordinate | Symbol | Load | FloorDiv


@dataclass(frozen=True, slots=True)
class Affine:
    """``const`` plus a sum of atoms, each with a factor other than 0."""

    terms: tuple[tuple[Atom, int], ...] = ()
    const: int = 0

    def __add__(self, other: Affine | int) -> Affine:
        other = other if isinstance(other, Affine) else Affine(const=other)
        factors = dict(self.terms)
        for atom, factor in other.terms:
            factors[atom] = factors.get(atom, 0) + factor
        terms = tuple((atom, factor) for atom, factor in factors.items() if factor)
        return Affine(terms, self.const + other.const)

    def __mul__(self, factor: int) -> Affine:
        if factor == 0:
            return Affine()
        return Affine(tuple((a, f * factor) for a, f in self.terms), self.const * factor)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (-other)

    def factor(self, atom: Atom) -> int:
        """The factor of an atom, 0 where it is absent."""
        return dict(self.terms).get(atom, 0)

    def only(self, *kinds: type) -> bool:
        """Whether every atom is of one of these kinds."""
        return all(isinstance(atom, kinds) for atom, _ in self.terms)


@dataclass(frozen=True, slots=True)
class Constant:
    """True or False everywhere."""

    value: bool


@dataclass(frozen=True, slots=True)
class Truth:
    """The entry of a bool tensor."""

    load: Load


@dataclass(frozen=True, slots=True)
class Compare:
    """``left <= right``, ``left < right`` or ``left == right``."""

    op: str
    left: Affine
    right: Affine

    @property
    def difference(self) -> Affine:
        """``d`` where the comparison says ``d <= 0``, or ``d == 0``."""
        return self.left - self.right + (1 if self.op == "<" else 0)


@dataclass(frozen=True, slots=True)
class Not:
    """Negation."""

    of: Truth | Compare


@dataclass(frozen=True, slots=True)
class And:
    """Conjunction of at least two."""

    parts: tuple[Bool, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Disjunction of at least two."""

    parts: tuple[Bool, ...]


Bool: TypeAlias = Constant | Truth | Compare | Not | And | Or

TRUE, FALSE = Constant(True), Constant(False)
B, Q, KV = Coordinate("b"), Coordinate("q"), Coordinate("kv")


def variable(atom: Atom) -> Affine:
    """The affine expression of one atom."""
    return Affine(((atom, 1),))


def floor_div(numerator: Affine, divisor: int) -> Affine:
    """``numerator // divisor``."""
    if not numerator.terms:
        return Affine(const=numerator.const // divisor)
    return numerator if divisor == 1 else variable(FloorDiv(numerator, divisor))


def at_most(left: Affine, right: Affine) -> Bool:
    """``left <= right``."""
    difference = left - right
    if upper_bound(difference, {}, 0):
        return TRUE
    if not difference.terms:
        return Constant(difference.const <= 0)
    return Compare("<=", *_sides(difference)) if difference.const != 1 else _less(difference)


def equal(left: Affine, right: Affine) -> Bool:
    """``left == right``."""
    difference = left - right
    if not difference.terms:
        return Constant(difference.const == 0)
    if difference.terms[0][1] < 0:
        difference = -difference
    return Compare("==", *_sides(difference))


def upper_bound(value: Affine, sizes: Mapping[str, int], limit: int) -> bool:
    """Whether ``value <= limit`` follows from the coordinates' ranges; ``sizes`` may lack some."""
    total = value.const
    for atom, factor in value.terms:
        if not isinstance(atom, Coordinate):
            return False
        if factor > 0:
            if atom.name not in sizes:
                return False
            total += factor * (sizes[atom.name] - 1)
    return total <= limit


def negate(value: Bool) -> Bool:
    """``not value``."""
    match value:
        case Constant():
            return Constant(not value.value)
        case Not():
            return value.of
        case And():
            return any_of(negate(part) for part in value.parts)
        case Or():
            return all_of(negate(part) for part in value.parts)
        case Compare() if value.op != "==":
            return at_most(-value.difference + 1, Affine())
        case _:
            return Not(value)


def offset_bound(part: Bool, low: Atom, high: Atom) -> Affine | None:
    """``c`` where a truth says ``low <= high + c`` and ``c`` is made of numbers, else ``None``.

    ``kv <= q + c`` is causality, ``q <= kv + c`` bounds a sliding window.
    """
    if not isinstance(part, Compare) or part.op == "==":
        return None
    bound = variable(low) - variable(high) - part.difference
    return bound if bound.only(Symbol) else None


def all_of(parts: Iterable[Bool]) -> Bool:
    """Conjunction."""
    return _joined(parts, And, TRUE, FALSE)


def any_of(parts: Iterable[Bool]) -> Bool:
    """Disjunction."""
    return _joined(parts, Or, FALSE, TRUE)


def _joined(parts: Iterable[Bool], kind: Any, neutral: Bool, absorbing: Bool) -> Bool:
    flat: dict[Bool, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, kind) else (part,):
            if inner == absorbing or negate_atom(inner) in flat:
                return absorbing
            if inner != neutral:
                flat[inner] = None
    flat = _without_implied(flat, kind)
    if not flat:
        return neutral
    if len(flat) == 1:
        return next(iter(flat))
    closed = _closed(flat, kind)
    if closed is None:
        return absorbing
    return kind(tuple(flat)) if closed == flat else _joined(closed, kind, neutral, absorbing)


def _closed(parts: dict[Bool, None], kind: Any) -> dict[Bool, None] | None:
    """Parts without what others decide: ``a & (~a | b)`` is ``a & b``, ``a | (a & b)`` is ``a``.

    ``None`` where two of them decide the whole: ``q < kv`` and ``kv <= q``.
    """
    simple = [part for part in parts if not isinstance(part, (And, Or))]
    for i, one in enumerate(simple):
        if any(_decide(one, other, kind) for other in simple[i + 1 :]):
            return None
    closed: dict[Bool, None] = {}
    for part in parts:
        if not isinstance(part, (And, Or)):
            closed[part] = None
            continue
        if any(_follows(other, inner, kind) for inner in part.parts for other in simple):
            continue
        left = [i for i in part.parts if not any(_decide(other, i, kind) for other in simple)]
        closed[any_of(left) if kind is And else all_of(left)] = None
    return closed


def _decide(one: Bool, other: Bool, kind: Any) -> bool:
    """Whether a conjunction of two never holds, or a disjunction of them always."""
    if negate_atom(one) == other:
        return True
    first, second = _bound(one), _bound(other)
    if first is None or second is None or first[0] != {(a, -f) for a, f in second[0]}:
        return False
    total = first[1] + second[1]
    return total > 0 if kind is And else total <= 1


def _follows(one: Bool, other: Bool, kind: Any) -> bool:
    """Whether ``one`` implies ``other``, in a conjunction; in a disjunction the converse."""
    if one == other:
        return True
    first, second = _bound(one), _bound(other)
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[1] >= second[1] if kind is And else first[1] <= second[1]


def _bound(part: Bool) -> tuple[frozenset[tuple[Atom, int]], int] | None:
    """The terms and the constant of a sum that a part says is not positive."""
    if not isinstance(part, Compare) or part.op == "==":
        return None
    difference = part.difference
    return frozenset(difference.terms), difference.const


def _without_implied(parts: dict[Bool, None], kind: Any) -> dict[Bool, None]:
    """Of comparisons that differ by a constant the strictest in a conjunction, else the loosest."""
    kept: dict[frozenset[tuple[Atom, int]], tuple[int, Bool]] = {}
    for part in parts:
        if isinstance(part, Compare) and part.op != "==":
            difference = part.difference
            terms, const = frozenset(difference.terms), difference.const
            known = kept.get(terms)
            if known is None or (const > known[0]) == (kind is And):
                kept[terms] = const, part
    if not kept:
        return parts
    left = {part for _, part in kept.values()}
    return {
        part: None
        for part in parts
        if not isinstance(part, Compare) or part.op == "==" or part in left
    }


def negate_atom(value: Bool) -> Bool | None:
    """The negation where it is no bigger than what is negated."""
    return negate(value) if isinstance(value, (Compare, Truth, Not)) else None


def conjuncts(value: Bool) -> tuple[Bool, ...]:
    """The parts of a conjunction, one for anything else but True."""
    if value == TRUE:
        return ()
    return value.parts if isinstance(value, And) else (value,)


def _less(difference: Affine) -> Compare:
    return Compare("<", *_sides(difference - 1))


def _sides(difference: Affine) -> tuple[Affine, Affine]:
    """Positive terms left, negative terms right, the constant where it cannot overflow an entry."""
    left = Affine(tuple((a, f) for a, f in difference.terms if f > 0))
    right = Affine(tuple((a, -f) for a, f in difference.terms if f < 0))
    loads_left = any(isinstance(atom, Load) for atom, _ in left.terms)
    loads_right = any(isinstance(atom, Load) for atom, _ in right.terms)
    to_left = difference.const > 0 if loads_left == loads_right else loads_right
    if to_left:
        return left + difference.const, right
    return left, right - difference.const
