"""The modules that lead to attention calls, as the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .explain_report import ReportedCall


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeRow:
    """One row: a module that holds others, or an attention call.

    Attributes:
        depth: Modules above it, 0 for the model.
        label: Name below the module above; a chain of only children is one label.
        module: Class name, where it is known.
        call: The call; ``None`` for a module that holds others.
        calls: The calls below, that of the row itself included.
        sparse: How many of them are sparse.
        density: Mean density of the sparse ones; ``None`` where there are none.
    """

    depth: int
    label: str
    module: str
    call: ReportedCall | None
    calls: int
    sparse: int
    density: float | None


@dataclass(slots=True)
class _Node:
    calls: list[ReportedCall] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def below(self) -> list[ReportedCall]:
        """All calls, one's own first."""
        return [*self.calls, *(call for node in self.children.values() for call in node.below())]


def build_tree(calls: Sequence[ReportedCall], root: str) -> list[TreeRow]:
    """Returns the rows of all modules above the calls, each above what it holds.

    Args:
        calls: Of one forward pass.
        root: Class name of the model, the label of the first row.
    """
    top = _Node()
    for call in calls:
        node = top
        for part in _path(call.record.layer, root):
            node = node.children.setdefault(part, _Node())
        node.calls.append(call)
    return _rows(top, root, root, depth=0)


def _path(layer: str, root: str) -> list[str]:
    """The names of the modules above a call; `explain` calls the model itself by its class."""
    return [] if layer in ("", root) else layer.split(".")


def _rows(node: _Node, label: str, module: str, *, depth: int) -> list[TreeRow]:
    if len(node.calls) == 1 and not node.children and depth > 0:
        (call,) = node.calls
        return [_row(depth, label, call.module, node.calls, call)]
    rows = [_row(depth, label, module, node.below())]
    rows += [_row(depth + 1, f"call {i}", c.module, [c], c) for i, c in enumerate(node.calls, 1)]
    for name, child in node.children.items():
        while len(child.children) == 1 and not child.calls:
            ((below, child),) = child.children.items()
            name = f"{name}.{below}"
        rows += _rows(child, name, "", depth=depth + 1)
    return rows


def _row(
    depth: int,
    label: str,
    module: str,
    calls: Sequence[ReportedCall],
    call: ReportedCall | None = None,
) -> TreeRow:
    densities = [c.record.density for c in calls if c.record.density is not None]
    return TreeRow(
        depth=depth,
        label=label,
        module="" if call is None and module == label else module,
        call=call,
        calls=len(calls),
        sparse=sum(c.record.decision == "sparse" for c in calls),
        density=sum(densities) / len(densities) if densities else None,
    )
