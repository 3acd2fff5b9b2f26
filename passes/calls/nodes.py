"""What a node of a graph is: its operation by one name, and what tracing recorded for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

# The types of ``torch.ops.aten.add.Tensor`` and of ``torch.ops.aten.add``.
OVERLOAD: type[Any] = type(torch.ops.aten.add.Tensor)
PACKET: type[Any] = type(torch.ops.aten.add)


def operation(node: fx.Node) -> str:
    """One name for every spelling: ``add`` for a method, an operator, a function, an ATen op.

    An operation in place keeps its underscore. Empty for what is no call.
    """
    target: Any = node.target
    if node.op == "call_method":
        name = str(target)
    elif node.op != "call_function":
        return ""
    elif isinstance(target, OVERLOAD):
        name = target._schema.name.partition("::")[2]
    else:
        name = getattr(target, "__name__", "")
        if getattr(target, "__module__", "") == "_operator":
            return name.strip("_")
    return name.strip("_") if name.startswith("__") else name


def recorded(node: Any) -> Tensor | None:
    """The (fake) tensor that tracing recorded for a node."""
    value = recorded_value(node)
    return value if isinstance(value, Tensor) else None


def recorded_value(node: Any) -> Any:
    """What tracing recorded for a node: a fake tensor, a symbolic number, ..."""
    meta = getattr(node, "meta", {})
    return meta.get("val", meta.get("example_value"))
