"""Readers of operations that compare the entries of a mask or join truths."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...block_masks.masks import Affine, Bool, all_of, any_of, at_most, equal, negate
from .in_place import operation_of
from .readers import Lifter, elementwise, handles, operands, tensor_of
from .values import Absolute, Choice, NotUnderstood, as_affine, as_bool, checked


@handles("le", "lt", "ge", "gt", "eq", "ne")
def _compare(lifter: Lifter, node: fx.Node) -> Any:
    try:
        left, right = operands(lifter, node)
        return _comparison(operation_of(node), left, right)
    except NotUnderstood:
        return as_bool(elementwise(lifter, node))


@handles("and", "bitwise_and", "logical_and", "or", "bitwise_or", "logical_or")
def _join(lifter: Lifter, node: fx.Node) -> Any:
    _require_bool(node, *node.args[:2], logical="logical" in operation_of(node))
    parts = [as_bool(operand) for operand in operands(lifter, node)]
    return all_of(parts) if "and" in operation_of(node) else any_of(parts)


@handles("xor", "bitwise_xor", "logical_xor")
def _xor(lifter: Lifter, node: fx.Node) -> Any:
    _require_bool(node, *node.args[:2], logical="logical" in operation_of(node))
    left, right = (as_bool(operand) for operand in operands(lifter, node))
    return _differ(left, right)


@handles("not", "invert", "bitwise_not", "logical_not")
def _not(lifter: Lifter, node: fx.Node) -> Any:
    _require_bool(node, node.args[0], logical="logical" in operation_of(node))
    return negate(as_bool(lifter.read(node.args[0])))


def _require_bool(node: fx.Node, *arguments: Any, logical: bool) -> None:
    """Raises NotUnderstood where an operation works on bits."""
    if not logical and tensor_of(node).dtype is not torch.bool:
        raise NotUnderstood


def _comparison(name: str, left: Any, right: Any) -> Bool:
    if name in ("ge", "gt"):
        return _comparison({"ge": "le", "gt": "lt"}[name], right, left)
    if name == "ne":
        return negate(_comparison("eq", left, right))
    if isinstance(left, Absolute) or isinstance(right, Absolute):
        return _compare_absolute(name, left, right)
    if isinstance(left, Affine) and isinstance(right, Affine):
        for side in (left, right):
            if not _is_entry(side):
                checked(side)
        if name == "eq":
            return equal(left, right)
        return at_most(left, right) if name == "le" else negate(at_most(right, left))
    if name == "eq" and _is_bool(left) and _is_bool(right):
        return negate(_differ(left, right))
    raise NotUnderstood


def _compare_absolute(name: str, left: Any, right: Any) -> Bool:
    """``|x| <= y`` as ``x <= y and -x <= y``; ``|x| >= y`` as its opposite."""
    if name == "eq" and Affine() in (left, right):
        (inside,) = (side.of for side in (left, right) if isinstance(side, Absolute))
        return equal(inside, Affine())
    if name == "eq" or (isinstance(left, Absolute) and isinstance(right, Absolute)):
        raise NotUnderstood
    if isinstance(right, Absolute):
        return negate(_compare_absolute("lt" if name == "le" else "le", right, left))
    limit = checked(as_affine(right))
    return all_of(_comparison(name, side, limit) for side in (left.of, -left.of))


def _is_entry(value: Affine) -> bool:
    return len(value.terms) == 1 and value.terms[0][1] == 1 and value.const == 0


def _is_bool(value: Any) -> bool:
    return value is not None and not isinstance(value, (Affine, Absolute, Choice))


def _differ(left: Bool, right: Bool) -> Bool:
    return any_of((all_of((left, negate(right))), all_of((negate(left), right))))
