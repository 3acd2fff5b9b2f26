"""Which tensors of a graph share memory with one that is changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .nodes import OVERLOAD, PACKET, operation

# Operations whose result is new memory, whatever their inputs are.
_FRESH = (
    "abs add all any arange bitwise_and bitwise_not bitwise_or bitwise_xor cat clone cumsum diff "
    "div embedding empty eq floor_divide floordiv full full_like ge gt invert item le linear "
    "logical_and logical_not logical_or lt masked_fill mul ne neg new_full new_ones new_zeros not "
    "ones ones_like or and rsub scalar_tensor size stack sub sym_size tensor tril triu where xor "
    "zeros zeros_like"
)
_OPERATORS = "setitem iadd isub imul itruediv ifloordiv iand ior ixor ipow imod"
FRESH, IN_PLACE_OPERATORS = frozenset(_FRESH.split()), frozenset(_OPERATORS.split())


def origins(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose memory ``node`` may share, itself where it is new memory."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        inputs = current.all_input_nodes
        if _is_in_place(current) and operation(current) != "set_":
            # Returns what it changed; only that one takes another tensor's memory.
            inputs = _nodes(current.args[0])
        if not inputs or operation(current) in FRESH:
            yield current
            continue
        for source in inputs:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def mutated_origins(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The memory that some of the nodes write to."""
    return {origin for node in nodes for written in _written(node) for origin in origins(written)}


def writers(nodes: Iterable[fx.Node], origin: fx.Node) -> list[fx.Node]:
    """Those of the nodes that may write to the memory of ``origin``."""
    return [n for n in nodes if any(origin in origins(written) for written in _written(n))]


def is_changed_between(node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether a node after ``first`` and in front of ``last`` may write to ``node``'s memory."""
    between, current = [], first.next
    while current is not last and current.op != "root":
        between.append(current)
        current = current.next
    return not mutated_origins(between).isdisjoint(origins(node))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes whose tensors ``node`` changes."""
    target: Any = node.target
    if isinstance(target, PACKET):
        overloads = [getattr(target, name) for name in target.overloads()]
    else:
        overloads = [target] if isinstance(target, OVERLOAD) else []
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            given = node.args[position : position + 1] or (node.kwargs.get(argument.name),)
            if argument.is_write:
                yield from _nodes(given)
    if overloads:
        return
    yield from _nodes(node.kwargs.get("out"))
    if isinstance(target, torch._ops.HigherOrderOperator) and "mutation" in operation(node):
        yield from node.all_input_nodes
    if _is_in_place(node) or (node.kwargs.get("inplace") and node.args):
        yield from _nodes(node.args[0])


def _is_in_place(node: fx.Node) -> bool:
    """Whether a node changes its first argument, by its name."""
    name = operation(node)
    return bool(node.args) and (name.endswith("_") or name in IN_PLACE_OPERATORS)


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found
