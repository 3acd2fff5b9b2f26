"""Readers of operations that make, choose or compute the entries of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...block_masks.masks import (
    TRUE,
    Affine,
    Bool,
    Constant,
    Coordinate,
    all_of,
    any_of,
    at_most,
    floor_div,
    negate,
)
from .in_place import operation_of
from .readers import Lifter, elementwise, handles, operands, tensor_of
from .values import (
    Absolute,
    Choice,
    NotUnderstood,
    aligned,
    as_affine,
    as_bool,
    as_choice,
    checked,
    dim,
    has_entries,
    in_dtype,
    is_empty,
    is_one,
    substitute,
    where,
)

INTEGERS = (torch.int32, torch.int64)


@handles("arange")
def _arange(lifter: Lifter, node: fx.Node) -> Any:
    if tensor_of(node).dtype not in INTEGERS:
        raise NotUnderstood
    bounds = [*node.args, *(node.kwargs[n] for n in ("start", "end") if n in node.kwargs)]
    step = bounds.pop() if len(bounds) > 2 else node.kwargs.get("step", 1)
    if not isinstance(step, int) or (len(bounds) == 1 and "start" in node.kwargs):
        raise NotUnderstood
    start = lifter.number(bounds[0]) if len(bounds) == 2 else Affine()
    return checked(dim(0) * step + start)


@handles("ones", "ones_like", "new_ones")
def _ones(lifter: Lifter, node: fx.Node) -> Any:
    return _constant(node, 1)


@handles("zeros", "zeros_like", "new_zeros")
def _zeros(lifter: Lifter, node: fx.Node) -> Any:
    return _constant(node, 0)


@handles("zero")
def _zero(lifter: Lifter, node: fx.Node) -> Any:
    return _constant(node, 0)


@handles("fill")
def _fill(lifter: Lifter, node: fx.Node) -> Any:
    return _constant(node, node.args[1])


@handles("full", "full_like", "new_full")
def _full(lifter: Lifter, node: fx.Node) -> Any:
    position = 2 if operation_of(node) == "new_full" else 1
    return _constant(node, lifter.argument(node, position, "fill_value"))


@handles("scalar_tensor", "tensor")
def _tensor(lifter: Lifter, node: fx.Node) -> Any:
    return _constant(node, node.args[0])


@handles(
    *("to", "_to_copy", "type", "type_as", "bool", "long", "int", "float", "double", "half"),
    *("bfloat16", "contiguous", "clone", "detach", "alias", "cuda", "cpu", "lift_fresh_copy"),
)
def _convert(lifter: Lifter, node: fx.Node) -> Any:
    source, target = tensor_of(node.args[0]), tensor_of(node)
    value = lifter.read(node.args[0])
    if source.device != target.device and has_entries(value):
        raise NotUnderstood
    if target.dtype is torch.bool:
        return as_bool(value)
    if source.dtype is target.dtype or (
        isinstance(value, Affine) and {source.dtype, target.dtype} <= set(INTEGERS)
    ):
        if source.dtype is not target.dtype and has_entries(value):
            raise NotUnderstood
        return value
    choice = as_choice(value)
    rounded = {
        float(torch.tensor(number, dtype=source.dtype).to(target.dtype)): region
        for number, region in choice.regions.items()
    }
    if len(rounded) != len(choice.regions):
        raise NotUnderstood
    return Choice(rounded)


@handles("add", "sub", "rsub", "mul")
def _arithmetic(lifter: Lifter, node: fx.Node) -> Any:
    if tensor_of(node).dtype is torch.bool:
        # A product of truths is their conjunction, a sum their disjunction.
        parts = [as_bool(operand) for operand in operands(lifter, node)]
        return {"mul": all_of, "add": any_of}[operation_of(node)](parts)
    try:
        return _integer_arithmetic(lifter, node)
    except NotUnderstood:
        return elementwise(lifter, node)


@handles("log", "exp", "sign", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num")
def _elementwise(lifter: Lifter, node: fx.Node) -> Any:
    return elementwise(lifter, node)


@handles("cat", "concat", "concatenate", "hstack", "vstack")
def _cat(lifter: Lifter, node: fx.Node) -> Any:
    """Parts side by side; those after the first count from where they begin."""
    rank, dtype = tensor_of(node).dim(), tensor_of(node).dtype
    sources: Any = node.args[0]
    if any(tensor_of(source).dim() != rank for source in sources):
        raise NotUnderstood
    named = {"hstack": min(1, rank - 1), "vstack": 0}.get(operation_of(node))
    along = lifter.argument(node, 1, "dim", 0) % rank if named is None else named
    parts = [source for source in sources if not is_empty(tensor_of(source).shape[along])]
    result: Any = None
    start = sum(_length(source, along) for source in parts)
    for source in reversed(parts):
        if tensor_of(source).dtype is not dtype:
            raise NotUnderstood
        start -= _length(source, along)
        # Of a part of size 1 nothing tells the coordinate along which it is repeated.
        value = lifter.read(source)
        value = substitute(value, {Coordinate(f"d{along}"): dim(along) - start} if start else {})
        if result is None:
            result = value
            continue
        inside = at_most(dim(along) + 1, Affine(const=start + _length(source, along)))
        result = _either(inside, value, result, dtype)
    return result


def _length(source: Any, along: int) -> int:
    size = tensor_of(source).shape[along]
    if not isinstance(size, int):
        raise NotUnderstood
    return size


def _either(inside: Bool, first: Any, second: Any, dtype: torch.dtype) -> Any:
    if dtype is not torch.bool:
        return where(inside, first, second)
    return any_of((all_of((inside, as_bool(first))), all_of((negate(inside), as_bool(second)))))


@handles("neg", "abs")
def _unary(lifter: Lifter, node: fx.Node) -> Any:
    value = lifter.read(node.args[0])
    if not isinstance(value, Affine) or tensor_of(node).dtype not in INTEGERS:
        return elementwise(lifter, node)
    return checked(-value) if operation_of(node) == "neg" else Absolute(checked(value))


@handles("floordiv", "floor_divide", "div")
def _floor_divide(lifter: Lifter, node: fx.Node) -> Any:
    floors = operation_of(node) != "div" or node.kwargs.get("rounding_mode") == "floor"
    divisor = node.args[1]
    if not floors or not isinstance(divisor, int) or divisor < 1 or divisor > 2**30:
        raise NotUnderstood
    if tensor_of(node).dtype not in INTEGERS:
        raise NotUnderstood
    return floor_div(checked(as_affine(lifter.read(node.args[0]))), divisor)


@handles("where", "masked_fill")
def _where(lifter: Lifter, node: fx.Node) -> Any:
    if operation_of(node) == "masked_fill":
        second, condition, first = node.args
    elif node.op == "call_method":
        first, condition, second = node.args
    else:
        condition, first, second = node.args
    rank, dtype = tensor_of(node).dim(), tensor_of(node).dtype
    tested = as_bool(lifter.broadcast(condition, rank))
    chosen = [lifter.broadcast(part, rank) for part in (first, second)]
    if dtype is torch.bool:
        return _either(tested, chosen[0], chosen[1], dtype)
    return in_dtype(where(tested, *chosen), dtype)


@handles("tril", "triu")
def _triangle(lifter: Lifter, node: fx.Node) -> Any:
    rank = tensor_of(node).dim()
    diagonal = lifter.number(lifter.argument(node, 1, "diagonal", 0))
    beyond = dim(rank - 1) - dim(rank - 2) - diagonal
    lower = operation_of(node) == "tril"
    kept = at_most(beyond, Affine()) if lower else at_most(-beyond, Affine())
    value = lifter.read(node.args[0])
    if tensor_of(node).dtype is torch.bool:
        return all_of((kept, as_bool(value)))
    return where(kept, value, Choice({0.0: TRUE}))


@handles("cumsum")
def _cumsum(lifter: Lifter, node: fx.Node) -> Any:
    number = as_affine(as_choice(lifter.read(node.args[0])))
    along = lifter.argument(node, 1, "dim") % tensor_of(node).dim()
    if tensor_of(node).dtype not in INTEGERS:
        raise NotUnderstood
    return checked((dim(along) + 1) * number.const)


@handles("diff")
def _diff(lifter: Lifter, node: fx.Node) -> Any:
    """Consecutive positions differ by a constant, and the first from what is put before it."""
    rank = tensor_of(node).dim()
    if (
        lifter.argument(node, 1, "n", 1) != 1
        or lifter.argument(node, 2, "dim", -1) % rank != rank - 1
    ):
        raise NotUnderstood
    if lifter.argument(node, 4, "append") is not None:
        raise NotUnderstood
    value = checked(as_affine(lifter.read(node.args[0])))
    last = Coordinate(f"d{rank - 1}")
    step = value.factor(last)
    rest = value - dim(rank - 1) * step
    before = lifter.argument(node, 3, "prepend")
    if substitute(rest, {last: Affine(const=1)}) != rest:
        raise NotUnderstood
    if before is not None:
        tensor = tensor_of(before)
        first = rest - as_affine(aligned(lifter.read(before), tensor.shape, rank))
        if not is_one(tensor.shape[-1]) or first != Affine(const=step):
            raise NotUnderstood
    return Affine(const=step)


def _integer_arithmetic(lifter: Lifter, node: fx.Node) -> Affine:
    if tensor_of(node).dtype not in INTEGERS or "alpha" in node.kwargs:
        raise NotUnderstood
    left, right = (checked(as_affine(operand)) for operand in operands(lifter, node))
    match operation_of(node):
        case "add":
            return checked(left + right)
        case "sub":
            return checked(left - right)
        case "rsub":
            return checked(right - left)
    if left.terms and right.terms:
        raise NotUnderstood
    return checked(left * right.const if left.terms else right * left.const)


def _constant(node: fx.Node, number: Any) -> Any:
    exact = isinstance(number, float) or (isinstance(number, int) and abs(number) < 2**53)
    if not exact:
        raise NotUnderstood
    dtype = tensor_of(node).dtype
    if dtype is torch.bool:
        return Constant(bool(number))
    return in_dtype(Choice({number: TRUE}), dtype)
