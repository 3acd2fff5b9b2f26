"""Walks over mask expressions: what they are made of, and the same with parts replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from .expr import (
    Affine,
    And,
    Atom,
    Bool,
    Compare,
    Coordinate,
    FloorDiv,
    Load,
    Not,
    Or,
    Truth,
    all_of,
    any_of,
    at_most,
    equal,
    floor_div,
    negate,
    variable,
)

Replace: TypeAlias = Callable[[Atom], Affine | None]


def atoms(value: Bool | Affine) -> Iterator[Atom]:
    """Every atom, those inside others too, in order and with repetitions."""
    match value:
        case Affine():
            for atom, _ in value.terms:
                yield atom
                if isinstance(atom, FloorDiv):
                    yield from atoms(atom.numerator)
                elif isinstance(atom, Load):
                    for index in atom.index:
                        yield from atoms(index)
        case Truth():
            yield from atoms(variable(value.load))
        case Compare():
            yield from atoms(value.left)
            yield from atoms(value.right)
        case Not():
            yield from atoms(value.of)
        case And() | Or():
            for part in value.parts:
                yield from atoms(part)


def coordinates(value: Bool | Affine) -> set[str]:
    """Names of the coordinates that a value depends on."""
    return {atom.name for atom in atoms(value) if isinstance(atom, Coordinate)}


def replace_in(value: Affine, replace: Replace) -> Affine:
    """The same with atoms replaced, outermost first; ``None`` keeps one and looks inside."""
    result = Affine(const=value.const)
    for atom, factor in value.terms:
        new = replace(atom)
        if new is None:
            match atom:
                case FloorDiv():
                    new = floor_div(replace_in(atom.numerator, replace), atom.divisor)
                case Load():
                    new = variable(_replace_index(atom, replace))
                case _:
                    new = variable(atom)
        result = result + new * factor
    return result


def replace_atoms(value: Bool, replace: Replace) -> Bool:
    """`replace_in` for truths; the result is normalised anew."""
    match value:
        case Truth():
            return Truth(_replace_load(value.load, replace))
        case Compare():
            difference = replace_in(value.difference, replace)
            zero = Affine()
            return equal(difference, zero) if value.op == "==" else at_most(difference, zero)
        case Not():
            return negate(replace_atoms(value.of, replace))
        case And():
            return all_of(replace_atoms(part, replace) for part in value.parts)
        case Or():
            return any_of(replace_atoms(part, replace) for part in value.parts)
        case _:
            return value


def map_parts(value: Bool, change: Callable[[Bool], Bool]) -> Bool:
    """The same with every comparison, entry and constant changed; the rest is joined anew."""
    match value:
        case Not():
            return negate(map_parts(value.of, change))
        case And():
            return all_of(map_parts(part, change) for part in value.parts)
        case Or():
            return any_of(map_parts(part, change) for part in value.parts)
        case _:
            return change(value)


def _replace_index(load: Load, replace: Replace) -> Load:
    return Load(load.source, tuple(replace_in(index, replace) for index in load.index))


def _replace_load(load: Load, replace: Replace) -> Load:
    new = replace(load)
    if new is None:
        return _replace_index(load, replace)
    ((atom, _),) = new.terms
    assert isinstance(atom, Load)
    return atom
