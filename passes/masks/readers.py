"""Reads the nodes that compute a mask as formulas over the mask's dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...block_masks.masks import TRUE, Affine, Atom, Coordinate, Symbol, variable
from ..calls import operation, recorded, recorded_value
from .given import GivenTensors
from .in_place import changes_in_place, operation_in_place
from .values import (
    Choice,
    NotUnderstood,
    Value,
    aligned,
    apply_to_choices,
    in_dtype,
    is_one,
    opaque,
    substitute,
)

Handler = Callable[["Lifter", fx.Node], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers the reader of operations."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Lifter:
    """The values of a mask's node and of what it is computed from.

    Args:
        root: The mask's node.
        given: Inputs of the graph whose entries are read; by default none.

    Attributes:
        visited: The nodes that were read.
        given: Likewise.
        changed: New tensors, and what changes them in place; their values are those after it.
        mapped_sizes: Sizes of the dimensions over which torch.vmap maps, as far as they were read.
    """

    def __init__(self, root: fx.Node, given: GivenTensors | None = None) -> None:
        self.visited, self.changed = _read_nodes(root)
        self.given = given
        self._target = {n: target for target, found in self.changed.items() for n in found}
        self._values: dict[fx.Node, Value] = {}
        self._levels: dict[fx.Node, frozenset[Any]] = {}
        self.mapped_sizes: dict[Atom, Any] = {}
        self._symbols: dict[Any, fx.Node] = {}
        for node in self.visited:
            self._levels[node] = self._open_levels(node)
            target = self._target.get(node)
            if target is None:
                self._values[node] = self._read(node)
            elif target in self.changed:
                self._change(node, target)
            else:
                self._values[node] = None

    def value_of(self, node: fx.Node) -> Value:
        """What a node computes; ``None`` where that is not known."""
        return self._values[node]

    def argument(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name, as the graph holds it."""
        if position < len(node.args):
            return node.args[position]
        return node.kwargs.get(name, default)

    def read(self, argument: Any) -> Value:
        """The value of an argument: a node or a plain number."""
        if isinstance(argument, fx.Node):
            return self._values[argument]
        if isinstance(argument, bool):
            return Choice({float(argument): TRUE})
        if isinstance(argument, int):
            return Affine(const=argument)
        if isinstance(argument, float):
            return Choice({argument: TRUE})
        raise NotUnderstood

    def number(self, argument: Any) -> Affine:
        """An argument that is an integer and no tensor."""
        value = self.read(argument)
        if recorded(argument) is not None or not isinstance(value, Affine):
            raise NotUnderstood
        return value

    def broadcast(self, argument: Any, rank: int) -> Any:
        """The value of an argument as it is broadcast to ``rank`` dimensions."""
        tensor = recorded(argument)
        return aligned(self.read(argument), () if tensor is None else tensor.shape, rank)

    def _change(self, node: fx.Node, target: fx.Node) -> None:
        """Reads a change in place, after which its target and what it was called have one value."""
        handler = HANDLERS.get(operation_in_place(node))
        value = None if handler is None else self._handled(handler, node)
        if isinstance(value, Choice):
            value = in_dtype(value, tensor_of(node).dtype)
        if value is None:
            del self.changed[target]
        for known in (target, *(n for n, of in self._target.items() if of is target)):
            self._values[known] = value

    def _handled(self, handler: Handler, node: fx.Node) -> Value:
        try:
            value: Value = handler(self, node)
        except (NotUnderstood, LookupError, TypeError, ValueError, RuntimeError):
            return None
        return value

    def _read(self, node: fx.Node) -> Value:
        tensor = recorded(node)
        if tensor is None:
            return self._read_scalar(node)
        handler = HANDLERS.get(operation(node))
        value = None if self.given is None else self.given.value_of(node)
        if handler is not None:
            value = self._handled(handler, node)
        if value is None:
            # Inside torch.vmap a node has no value of its own to read entries from.
            return None if self._levels[node] else opaque(node, tensor)
        ones = (i for i, size in enumerate(tensor.shape) if is_one(size))
        return substitute(value, {Coordinate(f"d{i}"): Affine() for i in ones})

    def _read_scalar(self, node: fx.Node) -> Value:
        value = recorded_value(node)
        if isinstance(value, (bool, float)):
            return Choice({float(value): TRUE})
        if isinstance(value, int):
            return Affine(const=value)
        if not isinstance(value, torch.SymInt):
            return None
        if operation(node) in ("add", "sub"):
            try:
                left, right = (self.number(argument) for argument in node.args)
                return left + right if operation(node) == "add" else left - right
            except (NotUnderstood, LookupError, ValueError):
                pass
        return variable(Symbol(self._symbols.setdefault(value.node.expr, node)))

    def _open_levels(self, node: fx.Node) -> frozenset[Any]:
        levels = frozenset[Any]().union(
            *(self._levels[source] for source in node.all_input_nodes if source in self._levels)
        )
        if operation(node) == "_add_batch_dim":
            return levels | {node.args[2]}
        if operation(node) == "_remove_batch_dim":
            return levels - {node.args[1]}
        return levels


def _read_nodes(root: fx.Node) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
    """``root`` and what it is computed from by operations that have a reader, in graph order.

    With what changes some of them in place.
    """
    found, pending = {root}, [root]
    changed: dict[fx.Node, list[fx.Node]] = {}
    while pending:
        node = pending.pop()
        changes = changes_in_place(node)
        if changes:
            changed[node] = changes
        is_read = operation(node) in HANDLERS or operation_in_place(node) in HANDLERS
        sources = node.all_input_nodes if is_read or recorded(node) is None else []
        for source in (*sources, *changes):
            if source not in found:
                found.add(source)
                pending.append(source)
    return [node for node in root.graph.nodes if node in found], changed


def tensor_of(node: Any) -> Tensor:
    """What tracing recorded for a node that must be a tensor."""
    tensor = recorded(node)
    if tensor is None:
        raise NotUnderstood
    return tensor


def operands(lifter: Lifter, node: fx.Node) -> list[Any]:
    """The first two arguments, broadcast to the rank of the result."""
    rank = tensor_of(node).dim()
    return [lifter.broadcast(argument, rank) for argument in node.args[:2]]


def elementwise(lifter: Lifter, node: fx.Node) -> Choice:
    """The operation on every combination of its operands' values."""
    rank = tensor_of(node).dim()
    values: list[Any] = []
    tensors = [recorded(argument) for argument in node.args]
    for argument, tensor in zip(node.args, tensors, strict=True):
        if tensor is not None:
            values.append(lifter.broadcast(argument, rank))
        elif isinstance(argument, fx.Node):
            raise NotUnderstood
        else:
            values.append(argument)
    return apply_to_choices(node, values, tensors)
