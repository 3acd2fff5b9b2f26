"""Tensors that Dynamo gives a graph, such as masks in buffers: their entries, read and guarded.

A graph that was compiled for what such a tensor says must not run when it says something else. A
guard asks before each call, as for a shape: it knows a tensor that was not changed since, reads any
other once, and has the graph compiled anew where the entries say something else.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ...block_masks.masks import (
    TRUE,
    Affine,
    Bool,
    Load,
    Truth,
    all_of,
    at_most,
    negate,
    variable,
)
from ..calls import mutated_origins, recorded
from .computed import Computed, table_of_pairs
from .entries import (
    Entries,
    PairEntries,
    PositionEntries,
    can_be_read,
    changes_of,
    entries_of,
    is_warmed_up,
)
from .values import Choice, Value, dim, is_one

# What a tensor may say in the graphs of one function before it stays a tensor there.
MOST = 4
# Tensors that a guard remembers: one for each layer that shares the graph.
MOST_PASSED = 256


class _History:
    """What the graphs of one function were compiled for, of one tensor that they are given."""

    def __init__(self) -> None:
        self.compiled: list[Entries] = []

    def has_room(self, entries: Entries) -> bool:
        known = entries in self.compiled and not self.is_given_up()
        return known or len(self.compiled) < MOST

    def is_given_up(self) -> bool:
        return len(self.compiled) > MOST

    def add(self, entries: Entries) -> None:
        if entries not in self.compiled:
            self.compiled.append(entries)


@dataclass(slots=True)
class _Trace:
    """What was read for one graph that Dynamo captured.

    Attributes:
        read: By the name of the tensor's source, what its entries say.
        histories: Likewise, what they said before.
        is_examined: Whether somebody looked what the graph's masks need.
    """

    read: dict[str, Entries] = field(default_factory=dict)
    histories: dict[str, _History] = field(default_factory=dict)
    is_examined: bool = False


_traces: weakref.WeakKeyDictionary[Any, _Trace] = weakref.WeakKeyDictionary()
# Guards hold them.
_histories: weakref.WeakValueDictionary[tuple[Any, ...], _History] = weakref.WeakValueDictionary()


def _output_in_force() -> Any:
    """Dynamo's `OutputGraph`, whose graph is being compiled; ``None`` outside of Dynamo."""
    if torch._guards.TracingContext.try_get() is None:
        return None
    # Importing Dynamo takes a second.
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return None
    # What outlives this process can hold no guard on what a tensor of it says.
    return None if output.export or output.package is not None else output


class GivenTensors:
    """The tensors that a graph is given, as far as somebody asks what their entries say.

    Args:
        nodes: Those of the graph that may be asked for.
        certain: Leaves out tensors [B, S], whose entries mostly stand for tokens and not for pairs.

    Attributes:
        used: Nodes whose entries were asked for and are known.
        changes_often: Whether some are known, but said too many different things before.
        uncounted: Whether some count no changes in place, and so are not read.
    """

    def __init__(self, nodes: Iterable[fx.Node], *, certain: bool) -> None:
        self._output = _output_in_force()
        self._tensors: dict[fx.Node, Tensor] = {}
        self.used: dict[fx.Node, Entries] = {}
        self.changes_often = self.uncounted = False
        if self._output is not None:
            for node in nodes:
                if _may_be_read(node, certain):
                    tensor = self._example(node)
                    if can_be_read(tensor):
                        self._tensors[node] = tensor
                    elif isinstance(tensor, Tensor) and tensor.dim() > 1:
                        self.uncounted |= tensor.is_inference()

    def __bool__(self) -> bool:
        """Whether there is something to read, or to say."""
        return bool(self._tensors) or self.uncounted

    def value_of(self, node: fx.Node) -> Value:
        """What a node's entries say, as a value of the lifter; ``None`` where nothing is known."""
        if node not in self._tensors:
            return None
        entries = entries_of(self._tensors[node])
        if entries is None or (_is_argument(node) and is_warmed_up(self._tensors[node])):
            return None
        if not self._history(node).has_room(entries):
            self._history(node).add(entries)
            self.changes_often = True
            return None
        self.used[node] = entries
        return _value(node, entries)

    def is_changed(self, graph: fx.Graph) -> bool:
        """Whether the graph itself changes memory of a tensor whose entries were asked for."""
        held = {_storage(self._tensors[node]) for node in self.used}
        return any(_storage(self._example(node)) in held for node in mutated_origins(graph.nodes))

    def guard(self) -> None:
        """Has the graph run only while the entries say what they were used for."""
        trace, context = _trace(self._output), torch._guards.TracingContext.get()
        for node, entries in self.used.items():
            name = _source(node).name
            if name in trace.read:
                continue
            trace.read[name] = entries
            history = self._history(node)
            history.add(entries)
            create = functools.partial(
                _match_entries, entries=entries, history=history, is_argument=_is_argument(node)
            )
            context.guards_context.dynamo_guards.add(torch._guards.Guard(_source(node), create))

    def _example(self, node: fx.Node) -> Any:
        """The real tensor that an input of the graph stands for while it is compiled."""
        source = _source(node)
        if source is not None:
            for argument in self._output.graphargs:
                if argument.source == source:
                    return argument.example
        return None

    def _history(self, node: fx.Node) -> _History:
        trace, name = _trace(self._output), _source(node).name
        if name not in trace.histories:
            compiling = torch._guards.CompileContext.current_compile_id()
            key = (self._output.root_tx.f_code, getattr(compiling, "frame_id", None), name)
            # The first graph of a function, or of one whose graphs were forgotten.
            is_first = getattr(compiling, "frame_compile_id", None) == 0
            history = _histories.get(key)
            if history is None or is_first:
                history = _histories[key] = _History()
            trace.histories[name] = history
        return trace.histories[name]


def _source(node: fx.Node) -> Any:
    """Where Dynamo's generated code finds an input of the graph."""
    return getattr(node, "_dynamo_source", None) if node.op == "placeholder" else None


def _is_argument(node: fx.Node) -> bool:
    """Whether an input of the graph is handed over with a call, and no state of a module."""
    return "MODULE" not in _source(node).guard_source.name


def _may_be_read(node: fx.Node, certain: bool) -> bool:
    tensor = recorded(node)
    if tensor is None or _source(node) is None or tensor.dim() == 0:
        return False
    if any(is_one(size) for size in tensor.shape[-2:]):
        return False
    if tensor.dim() == 1:
        return tensor.dtype in (torch.int32, torch.int64)
    rows, keys = tensor.shape[-2:]
    return not certain or tensor.dim() > 2 or guard_or_false(rows == keys)


def _storage(tensor: Any) -> Any:
    """What tensors of the same memory share."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        return tensor.untyped_storage().data_ptr()
    return None


def _trace(output: Any) -> _Trace:
    return _traces.setdefault(output.tracing_context, _Trace())


def given_identity(examine: Callable[[fx.Graph], None]) -> tuple[str, ...]:
    """What the tensors that the graph in compilation is given say, where its masks need it.

    A cache of compiled graphs must know it, and guards be there even if the cache has the graph
    and no pass runs.

    Args:
        examine: Looks what the masks of a graph need, and guards it.
    """
    output = _output_in_force()
    if output is None:
        return ()
    trace = _trace(output)
    if not trace.is_examined:
        trace.is_examined = True
        examine(output.graph)
    return tuple(f"{name}: {entries}" for name, entries in sorted(trace.read.items()))


def _match_entries(
    builder: Any, guard: Any, *, entries: Entries, history: _History, is_argument: bool
) -> None:
    """Makes Dynamo's guard; ``history`` is that of the function."""
    # By the id of a tensor that matched, the tensor and what would tell that it was changed.
    passed: dict[int, tuple[Any, ...]] = {}

    def matches(tensor: Any) -> bool:
        if history.is_given_up():
            return False
        known = passed.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1:] == changes_of(tensor):
            return not (is_argument and is_warmed_up(tensor))
        if not _may_match(tensor, is_argument):
            return False
        found = entries_of(tensor)
        if found is None or not entries.covers(found):
            return False
        if len(passed) >= MOST_PASSED:
            passed.clear()
        passed[id(tensor)] = weakref.ref(tensor), *changes_of(tensor)
        return True

    source = guard.originating_source
    from torch._dynamo.source import AttrSource

    # Guards of a module whose attributes are the same objects as before are not asked, unless
    # something of a tensor is read: changes in place show in no attribute of a module.
    builder.get_guard_manager_from_source(AttrSource(source, "_version"))
    manager = builder.get_guard_manager(guard)
    parts = [f"the entries of {source.name} say what the graph was compiled for"]
    manager.add_lambda_guard(matches, parts, guard.user_stack)


def _may_match(tensor: Any, is_argument: bool) -> bool:
    """Whether it is worth reading what a call is given."""
    if not can_be_read(tensor) or (is_argument and is_warmed_up(tensor)):
        return False
    # Graphs are made for others: a step of decoding is not to be read.
    return not any(size == 1 for size in tensor.shape[-2:])


def _value(node: fx.Node, entries: Entries) -> Value:
    if isinstance(entries, PositionEntries):
        return dim(0)
    tensor = recorded(node)
    assert tensor is not None
    shown = _formula(node, tensor, entries)
    if tensor.dtype is torch.bool:
        return shown if entries.shown else negate(shown)
    if entries.hidden is None:
        return Choice({entries.shown: TRUE})
    return Choice({entries.shown: shown, entries.hidden: negate(shown)})


def _formula(node: fx.Node, tensor: Tensor, entries: PairEntries) -> Bool:
    """Where entries show a pair, over the dimensions of their tensor."""
    rank = tensor.dim()
    query, key = dim(rank - 2), dim(rank - 1)
    batch = () if entries.along is None else (dim(entries.along),)
    size = () if entries.along is None else (tensor.shape[entries.along],)
    parts: list[Bool] = []
    if entries.causal_offset is not None:
        parts.append(at_most(key, query + entries.causal_offset))
    if entries.after is not None:
        parts.append(at_most(query + entries.after + 1, key))

    def load(name: str, place: Affine, length: Any, dtype: torch.dtype) -> Load:
        rest = (entries.shown, entries.along, entries.causal_offset, entries.after)
        value = tensor.new_empty((*size, length), dtype=dtype)
        made = Computed(node, table_of_pairs, (name, *rest), {"example_value": value})
        return Load(made, (*batch, place))

    for name in entries.tables:
        match name:
            case "last":
                end = load(name, query, tensor.shape[-2], torch.int64)
                parts.append(at_most(key, variable(end)))
            case "first":
                end = load(name, query, tensor.shape[-2], torch.int64)
                parts.append(at_most(variable(end), key))
            case "sees":
                parts.append(Truth(load(name, query, tensor.shape[-2], torch.bool)))
            case "valid":
                parts.append(Truth(load(name, key, tensor.shape[-1], torch.bool)))
    return all_of(parts)
