"""What an attention mask provably is: a node of a graph, lifted to a formula over positions.

The nodes that compute the mask are read as expressions over its dimensions. Where the whole comes
out as a formula whose tensors are per query or per key, the mask of pairs is not needed at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ...block_masks.masks import (
    FALSE,
    TRUE,
    Affine,
    Bool,
    Compare,
    Coordinate,
    Load,
    Symbol,
    atoms,
    coordinates,
    format_mask,
    map_parts,
    replace_atoms,
    replace_in,
    upper_bound,
    variable,
)
from ..calls import SdpaCall, mutated_origins, operation, origins, recorded, recorded_value
from . import shape_readers, truth_readers, value_readers  # noqa: F401  (the readers register)
from .computed import Computed
from .given import GivenTensors
from .kinds import describe_mask
from .proved_mask import ProvedMask
from .readers import HANDLERS, Lifter
from .values import Absolute, Choice, is_one

COORDINATES = ("b", "h", "q", "kv")
# Far beyond what masks say; a formula this long costs more than it saves.
MAX_TEXT = 2000
MAX_NUMBER = 2**30
ZERO = Affine()


class Unproved(StrEnum):
    """Why a mask stays a tensor."""

    UNRECORDED = "no shapes are recorded"
    UNTRACED = "what computes it cannot be traced"
    PAIRS = "it depends on query and key together in a way that is not understood"
    CHANGES = "a tensor that holds it said something else each time the graph was compiled"
    UNCOUNTED = "a tensor that holds it was made in inference mode, where no changes are counted"
    HEADS = "it differs between heads"
    BIAS = "it adds a bias to the logits"
    MUTATED = "a tensor that it is made of is changed in place"
    NUMBERS = "its integers may be too large for a kernel's arithmetic"
    LONG = "its formula is too long"


# Where the entries of tensors may say what the graph does not.
READABLE = (Unproved.PAIRS, Unproved.HEADS, Unproved.BIAS)


class MaskCache:
    """The masks of one graph, each lifted once for all the calls that share it."""

    def __init__(self) -> None:
        self._lifted: dict[tuple[Any, ...], ProvedMask | Unproved] = {}
        self._read: dict[fx.Node, None] = {}
        self._changed: dict[fx.Node, list[fx.Node]] = {}
        self._given: dict[tuple[Any, ...], GivenTensors] = {}
        self._inserted: dict[Computed, fx.Node] = {}

    def lift(
        self, node: fx.Node, shape: tuple[Any, ...] | None, *, may_read: bool = True
    ) -> ProvedMask | Unproved:
        """See `lift_mask`.

        Args:
            node: The mask.
            shape: Of the call.
            may_read: Whether entries of tensors that the graph is given may prove it.
        """
        if shape is None:
            return Unproved.UNRECORDED
        key = (node, may_read, *(str(size) for size in shape))
        if key not in self._lifted:
            lifter = Lifter(node)
            self._lifted[key] = lift_mask(node, shape, lifter)
            self._read.update(dict.fromkeys(lifter.visited))
            self._changed.update(lifter.changed)
            if may_read and self._lifted[key] in READABLE:
                self._read_given(node, shape, key, lifter.visited)
        return self._lifted[key]

    def use(self, mask: ProvedMask, call: SdpaCall) -> SdpaCall:
        """The call, bound to ``mask``, as a graph can hold it; guards what the proof relies on."""
        self.guard(mask)
        if not call.mask_tensors:
            return call
        return replace(call, mask_tensors=[self._insert(t) for t in call.mask_tensors])

    def guard(self, mask: ProvedMask) -> None:
        """Has the graph run only while tensors that it is given say what the proof relies on."""
        for key, lifted in self._lifted.items():
            if lifted is mask and key in self._given:
                self._given[key].guard()

    def _insert(self, tensor: Any) -> Any:
        if not isinstance(tensor, Computed):
            return tensor
        if tensor not in self._inserted:
            self._inserted[tensor] = tensor.insert()
        return self._inserted[tensor]

    def _read_given(
        self, node: fx.Node, shape: tuple[Any, ...], key: tuple[Any, ...], nodes: list[fx.Node]
    ) -> None:
        """Proves the mask from the entries of tensors that the graph is given, if it can."""
        for certain in (True, False):
            given = GivenTensors(nodes, certain=certain)
            if not given:
                continue
            lifted = lift_mask(node, shape, Lifter(node, given))
            if isinstance(lifted, ProvedMask):
                self._lifted[key], self._given[key] = lifted, given
                return
            if given.changes_often:
                lifted = Unproved.CHANGES
            elif given.uncounted:
                lifted = Unproved.UNCOUNTED
            if given.used or given.changes_often or given.uncounted:
                self._lifted[key] = lifted

    def erase_unused(self) -> None:
        """Erases what computed the masks and has no other use."""
        left = _erased_unused(self._read)
        for target, changes in self._changed.items():
            known = {target, *changes}
            if all(user in known for node in known for user in node.users):
                for node in reversed(changes):
                    node.graph.erase_node(node)
                left = _erased_unused([node for node in left if node not in changes])


def _erased_unused(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Erases those of the nodes that have a reader and no use; what is left."""
    left = []
    for node in sorted(nodes, reverse=True):
        if not node.users and operation(node) in HANDLERS:
            node.graph.erase_node(node)
        else:
            left.append(node)
    return left


def lift_mask(
    node: fx.Node, shape: tuple[Any, ...], lifter: Lifter | None = None
) -> ProvedMask | Unproved:
    """Proves what the mask that ``node`` computes is.

    Args:
        node: The mask in its graph: bool, or floating and added to the logits.
        shape: [B, Hq, Sq, Skv], perhaps symbolic.
        lifter: Where ``node`` was read; read anew by default.

    Returns:
        The formula, or why there is none.
    """
    mask = recorded(node)
    if mask is None or mask.dim() > len(COORDINATES):
        return Unproved.UNRECORDED
    lifter = Lifter(node) if lifter is None else lifter
    value = lifter.value_of(node)
    if isinstance(value, Choice):
        value = _visible(value, mask.dtype)
    if value is None or isinstance(value, (Affine, Absolute)):
        return Unproved.BIAS if mask.dtype.is_floating_point else Unproved.PAIRS
    mutated = mutated_origins(node.graph.nodes) - lifter.changed.keys()
    if not mutated.isdisjoint(o for visited in lifter.visited for o in origins(visited)):
        return Unproved.MUTATED
    if lifter.given is not None and lifter.given.is_changed(node.graph):
        return Unproved.MUTATED
    names = COORDINATES[len(COORDINATES) - mask.dim() :]
    ours = {Coordinate(f"d{i}"): variable(Coordinate(name)) for i, name in enumerate(names)}
    expr = replace_atoms(value, ours.get)  # type: ignore[arg-type]
    expr = _simplified(expr, dict(zip(COORDINATES, shape, strict=True)))
    if is_one(shape[0]):
        expr = _at_batch(expr)
    reason = _refuse(expr, mask.device)
    if reason is not None:
        return reason
    return _named(expr)


def _visible(value: Choice, dtype: torch.dtype) -> Bool | None:
    """Where an additive mask hides nothing, if hiding is all that it does."""
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else 0
    if any(entry != 0 and not entry <= lowest for entry in value.regions):
        return None
    return value.regions.get(0.0, FALSE)


def _simplified(expr: Bool, shape: dict[str, Any]) -> Bool:
    """The same for these sizes: comparisons that always or never hold are decided."""
    sizes = {name: size for name, size in shape.items() if isinstance(size, int)}

    def decide(part: Bool) -> Bool:
        if isinstance(part, Compare) and part.op != "==":
            if upper_bound(part.difference, sizes, 0):
                return TRUE
            if upper_bound(-part.difference + 1, sizes, 0):
                return FALSE
        return part

    return map_parts(expr, decide)


def _at_batch(expr: Bool) -> Bool:
    """The same in a batch of one: entry 0 of a dimension of one is the batch element's.

    A graph of one batch element reads entry 0. FlashAttention-4's template takes no number there.
    """
    own = variable(Coordinate("b"))

    def read(atom: Any) -> Affine | None:
        if not isinstance(atom, Load):
            return None
        tensor = recorded(atom.source)
        sizes = (None,) * len(atom.index) if tensor is None else tensor.shape
        index = tuple(
            own if part == ZERO and is_one(size) else replace_in(part, read)
            for part, size in zip(atom.index, sizes, strict=True)
        )
        return variable(Load(atom.source, index))

    return replace_atoms(expr, read)


def _refuse(expr: Bool, device: torch.device) -> Unproved | None:
    for atom in atoms(expr):
        if isinstance(atom, Load):
            names = {name for index in atom.index for name in coordinates(index)}
            if not names <= set(COORDINATES) or {"q", "kv"} <= names:
                return Unproved.PAIRS
            tensor = recorded(atom.source)
            if tensor is None or tensor.device != device:
                return Unproved.PAIRS
        elif isinstance(atom, Symbol):
            number = recorded_value(atom.source)
            if not guard_or_false(number < MAX_NUMBER) or not guard_or_false(number > -MAX_NUMBER):
                return Unproved.NUMBERS
        elif isinstance(atom, Coordinate) and atom.name not in COORDINATES:
            return Unproved.PAIRS
    return Unproved.HEADS if "h" in coordinates(expr) else None


def _named(expr: Bool) -> ProvedMask | Unproved:
    tensors: dict[fx.Node, str] = {}
    numbers: dict[fx.Node, str] = {}

    def rename(atom: Any) -> Affine | None:
        if isinstance(atom, Symbol):
            return variable(Symbol(numbers.setdefault(atom.source, f"n{len(numbers)}")))
        if isinstance(atom, Load):
            name = tensors.setdefault(atom.source, f"t{len(tensors)}")
            index = tuple(replace_in(part, rename) for part in atom.index)
            return variable(Load(name, index))
        return None

    named = replace_atoms(expr, rename)
    if len(format_mask(named)) > MAX_TEXT:
        return Unproved.LONG
    return ProvedMask(
        expr=named,
        tensors=tuple(tensors),
        numbers=tuple(numbers),
        kind=describe_mask(expr),
    )
