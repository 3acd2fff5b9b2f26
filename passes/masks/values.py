"""The values that nodes of a mask's graph take while the mask is lifted.

Dimension ``i`` of a node's tensor is the coordinate ``d<i>``, a batch dimension of `torch.vmap`
the coordinate ``v<level>``. A dimension of size 1 has no coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ...block_masks.masks import (
    TRUE,
    Affine,
    Atom,
    Bool,
    Constant,
    Coordinate,
    Load,
    Truth,
    all_of,
    any_of,
    atoms,
    equal,
    negate,
    replace_atoms,
    replace_in,
    variable,
)

MAX_CHOICES = 4
# Sums of coordinates and constants within these stay exact in a kernel's 32 bits.
MAX_FACTOR = 64
MAX_CONST = 2**30


class NotUnderstood(Exception):
    """An operation, or a use of one, that the lifter does not know."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A tensor of few values, each with where it stands; a number is a choice of one."""

    regions: Mapping[float, Bool]


@dataclass(frozen=True, slots=True)
class Absolute:
    """The absolute value of an integer."""

    of: Affine


Value: TypeAlias = Affine | Absolute | Bool | Choice | None


def dim(index: int) -> Affine:
    """The coordinate of a dimension."""
    return variable(Coordinate(f"d{index}"))


def substitute(value: Value, mapping: Mapping[Atom, Affine]) -> Any:
    """A value with coordinates replaced.

    Raises:
        NotUnderstood: An entry would be read at a position that may be negative, and so wrap.
    """
    replaced = map_value(value, mapping.get)
    for atom in value_atoms(replaced):
        if isinstance(atom, Load) and not all(is_position(index) for index in atom.index):
            raise NotUnderstood
    return replaced


def is_position(value: Affine) -> bool:
    """Whether an index is a coordinate, or a constant, or a sum of one each; never negative."""
    plain = all(isinstance(a, Coordinate) and f == 1 for a, f in value.terms)
    return plain and len(value.terms) <= 1 and value.const >= 0


def map_value(value: Value, replace: Callable[[Atom], Affine | None]) -> Value:
    """A value with atoms replaced, see `replace_in`."""
    match value:
        case Affine():
            return replace_in(value, replace)
        case Absolute():
            return Absolute(replace_in(value.of, replace))
        case Choice():
            return Choice({k: replace_atoms(r, replace) for k, r in value.regions.items()})
        case None:
            return None
        case _:
            return replace_atoms(value, replace)


def value_atoms(value: Value) -> Iterable[Atom]:
    """Every atom of a value."""
    match value:
        case Choice():
            return [atom for region in value.regions.values() for atom in atoms(region)]
        case Absolute():
            return atoms(value.of)
        case None:
            return ()
        case _:
            return atoms(value)


def has_entries(value: Value) -> bool:
    """Whether a value reads a tensor."""
    return any(isinstance(atom, Load) for atom in value_atoms(value))


def is_one(size: Any) -> bool:
    """Whether a dimension is known to have size 1."""
    return isinstance(size, int) and size == 1


def is_empty(size: Any) -> bool:
    """Whether a dimension is known to have size 0."""
    return isinstance(size, int) and size == 0


def aligned(value: Value, shape: Sequence[Any], rank: int) -> Any:
    """A value of a tensor of ``shape`` as it is broadcast to ``rank`` dimensions."""
    if value is None:
        raise NotUnderstood
    shift = rank - len(shape)
    moved: dict[Atom, Affine] = {
        Coordinate(f"d{i}"): Affine() if is_one(size) else dim(i + shift)
        for i, size in enumerate(shape)
    }
    return substitute(value, moved)


def checked(value: Affine) -> Affine:
    """An integer whose arithmetic cannot overflow.

    Raises:
        NotUnderstood: It might, or it computes with a tensor's entries, which might.
    """
    large = abs(value.const) > MAX_CONST or any(abs(f) > MAX_FACTOR for _, f in value.terms)
    if large or has_entries(value):
        raise NotUnderstood
    return value


def as_affine(value: Value) -> Affine:
    """An integer.

    Raises:
        NotUnderstood: It is none.
    """
    if isinstance(value, Affine):
        return value
    if isinstance(value, Choice) and len(value.regions) == 1:
        (number,) = value.regions
        if float(number).is_integer():
            return Affine(const=int(number))
    raise NotUnderstood


def as_bool(value: Value) -> Bool:
    """A truth, as ``Tensor.bool`` makes it.

    Raises:
        NotUnderstood: It has none that is known.
    """
    match value:
        case Affine():
            return negate(equal(value, Affine()))
        case Choice():
            return any_of(region for number, region in value.regions.items() if number)
        case Absolute() | None:
            raise NotUnderstood
        case _:
            return value


def as_choice(value: Value) -> Choice:
    """A tensor of few values.

    Raises:
        NotUnderstood: It has many.
    """
    match value:
        case Choice():
            return value
        case Affine() if not value.terms:
            return Choice({value.const: TRUE})
        case Affine() | Absolute() | None:
            raise NotUnderstood
        case Constant():
            return Choice({float(value.value): TRUE})
        case _:
            return Choice({1.0: value, 0.0: negate(value)})


def choose(parts: Iterable[tuple[float, Bool]]) -> Choice:
    """A choice from values and where they stand; regions of one value are joined.

    Raises:
        NotUnderstood: A NaN, or too many values.
    """
    regions: dict[float, Bool] = {}
    for number, region in parts:
        if region == Constant(False):
            continue
        if number != number:
            raise NotUnderstood
        regions[number] = any_of((regions.get(number, Constant(False)), region))
    if len(regions) > MAX_CHOICES:
        raise NotUnderstood
    return Choice(regions)


def where(condition: Bool, first: Value, second: Value) -> Choice:
    """``torch.where`` on choices."""
    kept = [(n, all_of((condition, r))) for n, r in as_choice(first).regions.items()]
    other = negate(condition)
    return choose(kept + [(n, all_of((other, r))) for n, r in as_choice(second).regions.items()])


def in_dtype(value: Choice, dtype: torch.dtype) -> Choice:
    """The values as ``dtype`` holds them."""
    regions: dict[float, Bool] = {}
    for number, region in value.regions.items():
        held = float(torch.tensor(number, dtype=dtype))
        regions[held] = any_of((regions.get(held, Constant(False)), region))
    return Choice(regions)


def apply_to_choices(
    node: fx.Node, operands: Sequence[Any], tensors: Sequence[Tensor | None]
) -> Choice:
    """The node's own operation on every combination of its operands' values.

    Args:
        node: An elementwise operation.
        operands: Its positional arguments: values of tensors, or plain numbers.
        tensors: What tracing recorded for each, ``None`` for a plain number.
    """
    combinations: list[tuple[list[Any], Bool]] = [([], TRUE)]
    for operand, tensor in zip(operands, tensors, strict=True):
        if tensor is None:
            combinations = [([*samples, operand], region) for samples, region in combinations]
            continue
        combinations = [
            ([*samples, _sample(number, tensor)], all_of((region, own)))
            for samples, region in combinations
            for number, own in as_choice(operand).regions.items()
        ]
    return choose((_run(node, samples), region) for samples, region in combinations)


def _sample(number: float, like: Tensor) -> Tensor:
    # Of the same rank class: numbers of no dimension do not decide the result's dtype.
    return torch.full((1,) * min(like.dim(), 1), number, dtype=like.dtype)


def _run(node: fx.Node, samples: list[Any]) -> float:
    target: Any = node.target
    kwargs = dict(node.kwargs)
    if any(isinstance(argument, fx.Node) for argument in kwargs.values()):
        raise NotUnderstood
    kwargs.pop("device", None)
    # Combinations share them, and the operation may be one in place.
    samples = [s.clone() if isinstance(s, Tensor) else s for s in samples]
    if node.op == "call_method":
        target = getattr(samples.pop(0), target)
    return float(target(*samples, **kwargs))


def opaque(node: Any, tensor: Tensor) -> Value:
    """The entries of a tensor that nothing else is known about; of a node or a `Computed`."""
    index = tuple(Affine() if is_one(size) else dim(i) for i, size in enumerate(tensor.shape))
    if tensor.dtype is torch.bool:
        return Truth(Load(node, index))
    if tensor.dtype in (torch.int32, torch.int64):
        return variable(Load(node, index))
    return None
