"""Mask expressions as text and back; reading executes nothing."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from .expr import (
    KV,
    Affine,
    And,
    B,
    Bool,
    Compare,
    Constant,
    FloorDiv,
    Load,
    Not,
    Or,
    Q,
    Symbol,
    Truth,
    all_of,
    any_of,
    at_most,
    equal,
    floor_div,
    negate,
    variable,
)

_COORDINATES = {coordinate.name: coordinate for coordinate in (B, Q, KV)}
_NUMBER, _TENSOR = re.compile(r"n\d+"), re.compile(r"t\d+")


def format_mask(value: Bool) -> str:
    """The expression as text that `parse_mask` reads."""
    match value:
        case Constant():
            return str(value.value)
        case Truth():
            return _format_load(value.load)
        case Compare():
            return f"{format_affine(value.left)} {value.op} {format_affine(value.right)}"
        case Not():
            return f"~({format_mask(value.of)})"
        case And():
            return " & ".join(f"({format_mask(part)})" for part in value.parts)
        case Or():
            return " | ".join(f"({format_mask(part)})" for part in value.parts)


def format_affine(value: Affine) -> str:
    """An integer expression as text."""
    text = ""
    for atom, factor in value.terms:
        match atom:
            case FloorDiv():
                name = f"({format_affine(atom.numerator)}) // {atom.divisor}"
                name = f"({name})" if abs(factor) != 1 else name
            case Load():
                name = _format_load(atom)
            case Symbol():
                name = str(atom.source)
            case _:
                name = atom.name
        sign = (" - " if factor < 0 else " + ") if text else ("-" if factor < 0 else "")
        name = name if abs(factor) == 1 else f"{abs(factor)} * {name}"
        text += sign + (f"({name})" if sign == "-" else name)
    if not text:
        return str(value.const)
    if value.const:
        text += f" {'-' if value.const < 0 else '+'} {abs(value.const)}"
    return text


@lru_cache(maxsize=256)
def parse_mask(text: str) -> Bool:
    """Reads what `format_mask` wrote.

    Raises:
        ValueError: The text is no mask expression.
    """
    try:
        return _parse_bool(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"mask must be a mask expression, got {text!r}") from error


def _format_load(load: Load) -> str:
    return f"{load.source}[{', '.join(format_affine(i) for i in load.index) or '()'}]"


def _parse_bool(node: ast.expr) -> Bool:
    match node:
        case ast.Constant(value=bool(value)):
            return Constant(value)
        case ast.Subscript():
            return Truth(_parse_load(node))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return negate(_parse_bool(operand))
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return all_of((_parse_bool(left), _parse_bool(right)))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return any_of((_parse_bool(left), _parse_bool(right)))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            first, second = _parse_int(left), _parse_int(right)
            match op:
                case ast.LtE():
                    return at_most(first, second)
                case ast.Lt():
                    return at_most(first + 1, second)
                case ast.Eq():
                    return equal(first, second)
    raise ValueError(f"mask must be a mask expression, got {ast.unparse(node)!r} in it")


def _parse_int(node: ast.expr) -> Affine:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return Affine(const=value)
        case ast.Name(id=name) if name in _COORDINATES:
            return variable(_COORDINATES[name])
        case ast.Name(id=name) if _NUMBER.fullmatch(name):
            return variable(Symbol(name))
        case ast.Subscript():
            return variable(_parse_load(node))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse_int(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _parse_int(left) + _parse_int(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _parse_int(left) - _parse_int(right)
        case ast.BinOp(left=ast.Constant(value=int(factor)), op=ast.Mult(), right=right):
            return _parse_int(right) * factor
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=ast.Constant(value=int(divisor))):
            if divisor > 0:
                return floor_div(_parse_int(left), divisor)
    raise ValueError(f"mask must be a mask expression, got {ast.unparse(node)!r} in it")


def _parse_load(node: ast.Subscript) -> Load:
    match node.value:
        case ast.Name(id=name) if _TENSOR.fullmatch(name):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return Load(name, tuple(_parse_int(item) for item in items))
    raise ValueError(f"mask must be a mask expression, got {ast.unparse(node)!r} in it")
