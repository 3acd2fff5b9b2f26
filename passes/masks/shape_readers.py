"""Readers of operations that move a mask's dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ...block_masks.masks import Affine, Atom, Coordinate, Load, Symbol, variable
from ..calls import operation, recorded, recorded_value
from .computed import Computed, position_from_start
from .readers import Lifter, handles, tensor_of
from .values import NotUnderstood, aligned, dim, is_one, map_value, opaque, substitute


@handles("expand", "expand_as", "broadcast_to")
def _expand(lifter: Lifter, node: fx.Node) -> Any:
    return lifter.broadcast(node.args[0], tensor_of(node).dim())


@handles("unsqueeze")
def _unsqueeze(lifter: Lifter, node: fx.Node) -> Any:
    rank = tensor_of(node).dim()
    new = lifter.argument(node, 1, "dim") % rank
    return _moved(lifter, node, [i for i in range(rank) if i != new])


@handles("permute")
def _permute(lifter: Lifter, node: fx.Node) -> Any:
    rank = tensor_of(node).dim()
    order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    places = [0] * rank
    for place, source in enumerate(order):
        places[source % rank] = place
    return _moved(lifter, node, places)


@handles("transpose", "swapaxes", "t")
def _transpose(lifter: Lifter, node: fx.Node) -> Any:
    rank = tensor_of(node).dim()
    ends: Any = (0, rank - 1) if operation(node) == "t" else node.args[1:3]
    first, second = ends
    places = list(range(rank))
    places[first], places[second] = places[second], places[first]
    return _moved(lifter, node, places)


@handles("getattr", "numpy_T", "mT", "matrix_H", "mH")
def _attribute(lifter: Lifter, node: fx.Node) -> Any:
    """``x.T`` and its relatives: an attribute, or from torch 2.14 on an operator."""
    rank = tensor_of(node).dim()
    name = node.args[1] if operation(node) == "getattr" else operation(node)
    whole = name in ("T", "H", "numpy_T", "matrix_H")
    if not (whole or name in ("mT", "mH")) or rank < 2:
        raise NotUnderstood
    last_two = [*range(rank - 2), rank - 1, rank - 2]
    return _moved(lifter, node, list(range(rank))[::-1] if whole else last_two)


@handles("view", "reshape", "squeeze", "view_as", "_unsafe_view")
def _view(lifter: Lifter, node: fx.Node) -> Any:
    before, after = tensor_of(node.args[0]).shape, tensor_of(node).shape
    sources = [i for i, size in enumerate(before) if not is_one(size)]
    targets = [i for i, size in enumerate(after) if not is_one(size)]
    if len(sources) != len(targets) or not all(
        guard_or_false(before[i] == after[j]) for i, j in zip(sources, targets, strict=True)
    ):
        raise NotUnderstood
    places = dict(zip(sources, targets, strict=True))
    return _moved(lifter, node, [places.get(i) for i in range(len(before))])


@handles("repeat")
def _repeat(lifter: Lifter, node: fx.Node) -> Any:
    counts = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    shape = tensor_of(node.args[0]).shape
    for size, count in zip(reversed(shape), reversed(counts), strict=False):
        if not is_one(size) and not is_one(count):
            raise NotUnderstood
    return lifter.broadcast(node.args[0], tensor_of(node).dim())


@handles("meshgrid")
def _meshgrid(lifter: Lifter, node: fx.Node) -> Any:
    """Has no value of its own: see `_getitem`."""
    raise NotUnderstood


def _of_meshgrid(lifter: Lifter, grid: fx.Node, place: Any) -> Any:
    sources: Any = grid.args if recorded(grid.args[0]) is not None else grid.args[0]
    axes = list(range(len(sources)))
    if grid.kwargs.get("indexing", "ij") == "xy" and len(axes) > 1:
        axes[:2] = 1, 0
    if any(tensor_of(source).dim() != 1 for source in sources):
        raise NotUnderstood
    return substitute(lifter.read(sources[place]), {Coordinate("d0"): dim(axes[place])})


@handles("getitem")
def _getitem(lifter: Lifter, node: fx.Node) -> Any:
    source: Any = node.args[0]
    items = node.args[1]
    if operation(source) == "meshgrid":
        return _of_meshgrid(lifter, source, items)
    return _indexed(lifter, node, list(items) if isinstance(items, (tuple, list)) else [items])


@handles("index")
def _index(lifter: Lifter, node: fx.Node) -> Any:
    items: Any = node.args[1]
    return _indexed(lifter, node, [slice(None) if item is None else item for item in items])


@handles("slice", "narrow")
def _slice(lifter: Lifter, node: fx.Node) -> Any:
    along: Any
    if operation(node) == "narrow":
        along, start, step = node.args[1], node.args[2], 1
    else:
        along, start = lifter.argument(node, 1, "dim", 0), lifter.argument(node, 2, "start")
        step = lifter.argument(node, 4, "step", 1)
    rank = tensor_of(node).dim()
    items: list[Any] = [slice(None)] * rank
    items[along % rank] = slice(start, None, step)
    return _indexed(lifter, node, items)


@handles("select")
def _select(lifter: Lifter, node: fx.Node) -> Any:
    rank = tensor_of(node.args[0]).dim()
    items: list[Any] = [slice(None)] * rank
    items[lifter.argument(node, 1, "dim") % rank] = lifter.argument(node, 2, "index")
    return _indexed(lifter, node, items)


@handles("_add_batch_dim")
def _add_batch_dim(lifter: Lifter, node: fx.Node) -> Any:
    arguments: Any = node.args
    source, batched, level = arguments
    rank = tensor_of(source).dim()
    mapping: dict[Atom, Affine] = {}
    for i in range(rank):
        mapping[Coordinate(f"d{i}")] = dim(i - (i > batched))
    mapped = Coordinate(f"v{level}")
    lifter.mapped_sizes[mapped] = tensor_of(source).shape[batched]
    mapping[Coordinate(f"d{batched}")] = variable(mapped)
    return substitute(lifter.read(source), mapping)


@handles("_remove_batch_dim")
def _remove_batch_dim(lifter: Lifter, node: fx.Node) -> Any:
    arguments: Any = node.args
    source, level, _, out = arguments
    rank = tensor_of(node).dim()
    mapping: dict[Atom, Affine] = {}
    for i in range(rank - 1):
        mapping[Coordinate(f"d{i}")] = dim(i + (i >= out))
    mapping[Coordinate(f"v{level}")] = dim(out)
    return substitute(lifter.read(source), mapping)


def _moved(lifter: Lifter, node: fx.Node, places: list[Any]) -> Any:
    """The value with dimension ``i`` at ``places[i]``; ``None`` drops one of size 1."""
    if len(places) != tensor_of(node.args[0]).dim():
        raise NotUnderstood
    mapping: dict[Atom, Affine] = {
        Coordinate(f"d{i}"): Affine() if place is None else dim(place)
        for i, place in enumerate(places)
    }
    return substitute(lifter.read(node.args[0]), mapping)


def _indexed(lifter: Lifter, node: fx.Node, items: list[Any]) -> Any:
    """``source[items]``, basic and advanced indices alike."""
    shape = tensor_of(node.args[0]).shape
    used = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (len(shape) - used)
    at = items.index(Ellipsis) if any(item is Ellipsis for item in items) else len(items)
    items = [*items[:at], *rest, *items[at + 1 :]]

    advanced = [i for i, item in enumerate(items) if recorded(item) is not None]
    numbers = [i for i, item in enumerate(items) if not isinstance(item, slice | None)]
    # With a tensor among them, integers are indices of no dimension.
    group = numbers if advanced else []
    ranks = [tensor_of(items[i]).dim() for i in advanced]
    if any(tensor_of(items[i]).dtype not in (torch.int32, torch.int64) for i in advanced):
        raise NotUnderstood
    rank = max(ranks, default=0)
    adjacent = bool(group) and group[-1] - group[0] == len(group) - 1
    first_place = sum(not isinstance(i, fx.Node | int) for i in items[: group[0]]) if group else 0
    place = first_place if adjacent else 0

    mapping: dict[Atom, Affine] = {}
    source, target = 0, 0 if adjacent or not group else rank
    for position, item in enumerate(items):
        if position in group and adjacent and position == group[0]:
            target += rank
        if item is None:
            target += 1
            continue
        if isinstance(item, slice):
            value = _sliced(lifter, item, dim(target), shape[source])
            target += 1
        elif position in advanced:
            index = tensor_of(item)
            value = aligned(_positions(lifter, item, shape[source]), index.shape, rank)
            value = substitute(value, {Coordinate(f"d{i}"): dim(i + place) for i in range(rank)})
        else:
            value = _from_start(lifter.number(item), shape[source])
        if position not in advanced:
            _require_position(value)
        mapping[Coordinate(f"d{source}")] = value
        source += 1
    value, looked_up = _tables_looked_up(lifter.read(node.args[0]), mapping)
    return substitute(value, mapping | looked_up)


def _tables_looked_up(value: Any, mapping: Mapping[Atom, Affine]) -> tuple[Any, dict[Atom, Affine]]:
    """A value whose tables are read at the entries of an index, and what stands for its places."""
    places: dict[Atom, Affine] = {}

    def replace(atom: Atom) -> Affine | None:
        if not isinstance(atom, Load) or not getattr(atom.source, "is_table", False):
            return None
        (last,) = (term for term, _ in atom.index[-1].terms) if atom.index[-1].terms else (None,)
        entry = mapping.get(last) if last is not None else None
        (found,) = (term for term, _ in entry.terms) if entry and len(entry.terms) == 1 else (None,)
        if not isinstance(found, Load) or entry != variable(found) or len(found.index) != 1:
            return None
        index = found.source.source if isinstance(found.source, Computed) else found.source
        place = Coordinate(f"at {last}")
        places[place] = found.index[0]
        made = atom.source.at(index, tensor_of(index))
        return variable(Load(made, (*atom.index[:-1], variable(place))))

    return map_value(value, replace), places


def _positions(lifter: Lifter, index: Any, size: Any) -> Any:
    """The value of a tensor of indices, of which those from the end are counted from the start."""
    value = lifter.read(index)
    try:
        _require_position(value)
    except NotUnderstood:
        if lifter.given is None or not isinstance(size, int):
            raise
        tensor = tensor_of(index)
        made = Computed(
            index, position_from_start, (size,), {"example_value": torch.empty_like(tensor)}
        )
        entries = opaque(made, tensor)
        return entries
    assert isinstance(value, Affine)
    _require_within(lifter, value, tensor_of(index).shape, size)
    return value


def _require_within(lifter: Lifter, value: Affine, shape: Sequence[Any], size: Any) -> None:
    """Raises NotUnderstood where an index of this shape reaches beyond ``size`` entries.

    Reading fails there, and no formula must hide that.
    """
    sizes = {Coordinate(f"d{i}"): length for i, length in enumerate(shape)} | lifter.mapped_sizes
    last = value.const
    for atom, factor in value.terms:
        if isinstance(atom, Symbol):
            last = last + factor * recorded_value(atom.source)
        elif atom in sizes:
            last = last + factor * (sizes[atom] - 1)
    if guard_or_false(last >= size):
        raise NotUnderstood


def _sliced(lifter: Lifter, item: slice, at: Affine, size: Any) -> Affine:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise NotUnderstood
    if item.start is None:
        return at * step
    return at * step + _from_start(lifter.number(item.start), size)


def _from_start(index: Affine, size: Any) -> Affine:
    """A position counted from the start, where ``index`` may count from the end."""
    if index.terms or index.const >= 0:
        return index
    if not isinstance(size, int):
        raise NotUnderstood
    # A slice that starts before the start begins there.
    return Affine(const=max(size + index.const, 0))


def _require_position(value: Any) -> None:
    """Raises NotUnderstood unless an index is known not to be negative: those wrap."""
    if not isinstance(value, Affine) or value.const < 0:
        raise NotUnderstood
    for atom, factor in value.terms:
        known = isinstance(atom, Coordinate) or (
            isinstance(atom, Symbol) and guard_or_false(recorded_value(atom.source) >= 0)
        )
        if factor < 0 or not known:
            raise NotUnderstood
