"""Masks that are made and then changed in place, before anything else is made of them."""

from __future__ import annotations

import torch
from torch import fx

from ..calls import FRESH, operation, recorded, writers

# Operators by the names that Python gives them, beside methods with an underscore behind.
OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "iand": "and",
    "ior": "or",
    "ixor": "xor",
}
# Operations that leave shape and dtype as they are.
_OF_ANY = "masked_fill fill zero tril triu"
_OF_NUMBERS = "add sub mul clamp clamp_min clamp_max log exp neg"
_OF_TRUTHS = "and or xor bitwise_and bitwise_or bitwise_xor bitwise_not logical_and logical_or "
_OF_TRUTHS += "logical_xor logical_not"
OF_ANY, OF_NUMBERS, OF_TRUTHS = (
    frozenset(names.split()) for names in (_OF_ANY, _OF_NUMBERS, _OF_TRUTHS)
)


def operation_in_place(node: fx.Node) -> str:
    """The operation whose result a node writes to its first argument; empty for any other node."""
    name, tensor = operation(node), recorded(node)
    name = OPERATORS.get(name, name[:-1] if name.endswith("_") else "")
    if tensor is None:
        return ""
    of_dtype = OF_TRUTHS if tensor.dtype is torch.bool else OF_NUMBERS
    return name if name in OF_ANY or name in of_dtype else ""


def operation_of(node: fx.Node) -> str:
    """`operation`, of a change in place that of the value it writes."""
    return operation_in_place(node) or operation(node)


def changes_in_place(node: fx.Node) -> list[fx.Node]:
    """What changes a new tensor in place, in order.

    Nothing where something reads the tensor before its last change, or changes a part of it: then
    no one value is the tensor's.
    """
    if operation(node) not in FRESH or recorded(node) is None:
        return []
    if not any(operation_in_place(user) for user in node.users):
        return []
    found = writers(node.graph.nodes, node)
    known = {node}
    for change in found:
        if not operation_in_place(change) or change.args[:1] == () or change.args[0] not in known:
            return []
        known.add(change)
    place = {other: i for i, other in enumerate(node.graph.nodes)}
    last = place[found[-1]] if found else -1
    readers = {user for each in known for user in each.users} - known
    return found if all(place[user] > last for user in readers) else []
