"""Grouped heads recovered: keys and values repeated for their query heads before SDPA.

Models repeat each key head for the G query heads of its group and call SDPA with equal heads.
What feeds the repetition, with ``enable_gqa``, is the same attention without the copies.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..calls import SdpaCall, is_changed_between, operation, recorded, recorded_value

HEAD_DIM = 1  # of [B, H, S, D]
COPIES = ("contiguous", "clone")
RESHAPES = ("reshape", "view", "flatten", "_unsafe_view")
TRANSPOSITIONS = ("transpose", "swapaxes", "swapdims", "permute")
REPETITION = (
    *(*COPIES, *RESHAPES, *TRANSPOSITIONS),
    *("repeat_interleave", "expand", "unsqueeze", "getitem"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """A tensor that repeats each head of another for its group.

    Attributes:
        source: The node before the repetition.
        order: Permutation that gives ``source`` the layout [B, Hkv, S, D].
        group: How often each head is repeated, more than once.
        since: The node from which on ``source`` may change without changing the copies.
    """

    source: fx.Node
    order: tuple[int, ...]
    group: int
    since: fx.Node


def recover_gqa(node: fx.Node, call: SdpaCall) -> tuple[SdpaCall, int]:
    """Takes the repetition of keys and values out of an attention call, where it is proved.

    Args:
        node: The call's node; nodes that view the unrepeated tensors go in front of it.
        call: Its arguments, with recorded shapes.

    Returns:
        The call on unrepeated keys and values (as it was where nothing is proved), and the bytes
        of the copies that it was the only one to use, at the recorded lengths.
    """
    key, value = find_repeated(call.key), find_repeated(call.value)
    if key is None or value is None or key.group != value.group:
        return call, 0
    if any(is_changed_between(found.source, found.since, node) for found in (key, value)):
        return call, 0
    repeated = call.key, call.value
    with node.graph.inserting_before(node):
        tensors = [_in_order(found) for found in (key, value)]
    saved = sum(
        _bytes(old) - _bytes(new)
        for old, new in zip(repeated, tensors, strict=True)
        if set(old.users) == {node}
    )
    return replace(call, key=tensors[0], value=tensors[1], enable_gqa=True), saved


def find_repeated(node: Any) -> Repeated | None:
    """What ``node``, [B, Hq, S, D], repeats along its heads; ``None`` where that is not proved.

    Follows ``repeat_interleave`` and unsqueeze, expand, reshape (Hugging Face's ``repeat_kv`` and
    its relatives), before or after a transposition.
    """
    order, head = tuple(range(4)), HEAD_DIM
    while isinstance(node, fx.Node):
        tensor, name = recorded(node), operation(node)
        if tensor is None or tensor.dim() != 4:
            return None
        if name in COPIES:
            node = node.args[0]
            continue
        permutation = _permutation(node, name)
        if permutation is not None:
            order = tuple(permutation[axis] for axis in order)
            head = order[HEAD_DIM]
            node = node.args[0]
            continue
        found = _interleaved(node, head) if name == "repeat_interleave" else None
        if found is None and name in RESHAPES:
            found = _expanded(node, head)
        if found is None:
            return None
        source, group, since = found
        return Repeated(source=source, order=order, group=group, since=since)
    return None


def _permutation(node: fx.Node, name: str) -> tuple[int, ...] | None:
    """The axes of a 4-D node in terms of its input's, where it only reorders them."""
    axes = list(range(4))
    if name in TRANSPOSITIONS[:3]:
        first, second = (_argument(node, i, f"dim{i - 1}") for i in (1, 2))
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        axes[first], axes[second] = axes[second], axes[first]
        return tuple(axes)
    if name == "permute":
        given = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims")
        if isinstance(given, Sequence) and sorted(_wrap(given, 4)) == axes:
            return tuple(_wrap(given, 4))
    return None


def _interleaved(node: fx.Node, head: int) -> tuple[fx.Node, int, fx.Node] | None:
    """``x.repeat_interleave(G, dim=head)``."""
    source = node.args[0]
    group, dim = _argument(node, 1, "repeats"), _argument(node, 2, "dim")
    if isinstance(group, fx.Node):
        group = _constant(recorded_value(group))
    if not isinstance(source, fx.Node) or not isinstance(group, int) or not isinstance(dim, int):
        return None
    before = recorded(source)
    if before is None or before.dim() != 4 or dim % 4 != head:
        return None
    return _checked(source, node, head, group, since=node)


def _expanded(node: fx.Node, head: int) -> tuple[fx.Node, int, fx.Node] | None:
    """``x.unsqueeze(head + 1).expand(..., G, ...).reshape(...)``."""
    expanded = node.args[0]
    while isinstance(expanded, fx.Node) and operation(expanded) in COPIES:
        expanded = expanded.args[0]
    if not isinstance(expanded, fx.Node) or operation(expanded) != "expand":
        return None
    inserted = expanded.args[0]
    wide = recorded(expanded)
    if not isinstance(inserted, fx.Node) or wide is None or wide.dim() != 5:
        return None
    source = _unsqueezed(inserted, head + 1)
    narrow = None if source is None else recorded(source)
    if source is None or narrow is None or narrow.dim() != 4:
        return None
    group = _constant(wide.shape[head + 1])
    # Nothing else may have been expanded.
    others = [size for axis, size in enumerate(wide.shape) if axis != head + 1]
    if group is None or not _same(others, narrow.shape):
        return None
    return _checked(source, node, head, group, since=expanded)


def _unsqueezed(node: fx.Node, axis: int) -> fx.Node | None:
    """What ``node`` adds one axis of size 1 to, at ``axis`` of its five."""
    source, name = node.args[0], operation(node)
    if not isinstance(source, fx.Node):
        return None
    if name == "unsqueeze":
        dim = _argument(node, 1, "dim")
        return source if isinstance(dim, int) and dim % 5 == axis else None
    if name == "getitem" or node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = [i for i, item in enumerate(index) if item is not None]
        new = [i for i, item in enumerate(index) if item is None]
        everything = all(index[i] in (slice(None), Ellipsis) for i in whole)
        ellipsis = [i for i in whole if index[i] is Ellipsis]
        # An ellipsis in front of the new axis hides where it lands.
        if everything and new == [axis] and all(i > axis for i in ellipsis):
            return source
    return None


def _checked(
    source: fx.Node, repeated: fx.Node, head: int, group: int, *, since: fx.Node
) -> tuple[fx.Node, int, fx.Node] | None:
    """The parts, if ``repeated`` has ``source``'s shape but for ``group`` times the heads."""
    before, after = recorded(source), recorded(repeated)
    assert before is not None
    assert after is not None
    wanted = list(before.shape)
    wanted[head] *= group
    return (source, group, since) if group > 1 and _same(after.shape, wanted) else None


def _in_order(found: Repeated) -> fx.Node:
    source = found.source
    if found.order == tuple(range(4)):
        return source
    node = source.graph.call_function(torch.permute, (source, list(found.order)))
    for name in ("example_value", "val"):
        if name in source.meta:
            node.meta[name] = source.meta[name].permute(found.order)
    return node


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _wrap(axes: Sequence[Any], rank: int) -> list[int]:
    return [axis % rank if isinstance(axis, int) else -1 for axis in axes]


def _same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal without a guard."""
    return len(sizes) == len(others) and all(
        str(size) == str(other) for size, other in zip(sizes, others, strict=True)
    )


def _constant(size: Any) -> int | None:
    """A size that is no longer symbolic, if only its type is."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else None


def _bytes(node: fx.Node) -> int:
    tensor = recorded(node)
    assert tensor is not None
    count = tensor.element_size()
    for size in tensor.shape:
        count *= size if isinstance(size, int) else (size.node.hint or 0)
    return count


def erase_unused(repeated: Sequence[fx.Node]) -> None:
    """Erases repetitions that `recover_gqa` left without a user."""
    for node in repeated:
        while not node.users and node.op in ("call_function", "call_method"):
            source = node.args[0]
            node.graph.erase_node(node)
            if not isinstance(source, fx.Node) or operation(source) not in REPETITION:
                break
            node = source
