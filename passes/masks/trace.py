"""What the mask that a function would compute provably is, without computing it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .computed import Computed
from .prove import Unproved, lift_mask
from .proved_mask import ProvedMask


def trace_mask(
    compute: Callable[..., Tensor], numbers: Sequence[int], shape: tuple[int, int, int, int]
) -> ProvedMask | Unproved:
    """Proves what ``compute(*numbers)`` is; no tensor of pairs is made on the way.

    Args:
        compute: Makes the mask from integers and from tensors that it holds.
        numbers: The integers. They stay names in the formula, so that masks which differ in them
            alone have the same text; all others that ``compute`` knows become part of it.
        shape: [B, Hq, Sq, Skv] of the call.

    Returns:
        The formula, its tensors copied, or why there is none.
    """
    try:
        traced = _trace(compute, numbers)
    except Exception:  # Whatever a model's own mask function may do.
        return Unproved.UNTRACED
    (root,) = traced.graph.find_nodes(op="output")[0].all_input_nodes or (None,)
    proved = Unproved.UNTRACED if root is None else lift_mask(root, shape)
    if isinstance(proved, Unproved):
        return proved
    return _with_values(proved, traced, numbers)


def _trace(compute: Callable[..., Tensor], numbers: Sequence[int]) -> fx.GraphModule:
    def run(*given: int) -> Tensor:
        return compute(*given)

    # Numbers become symbols only in this mode, tensors that are no inputs need the flag.
    trace = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    with torch.no_grad():
        traced = trace(*numbers)
    for node in traced.graph.find_nodes(op="get_attr"):
        node.meta.setdefault("val", operator.attrgetter(node.target)(traced))
    return traced


def _with_values(proved: ProvedMask, traced: fx.GraphModule, numbers: Sequence[int]) -> ProvedMask:
    values: dict[fx.Node, Any] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), numbers, strict=True)
    )
    interpreter = fx.Interpreter(traced)

    def value(node: Any) -> Any:
        if isinstance(node, Computed):
            return node.function(value(node.source), *node.arguments)
        if node not in values:
            for source in node.all_input_nodes:
                value(source)
            interpreter.env = values
            values[node] = interpreter.run_node(node)
        return values[node]

    with torch.no_grad():
        # Copies: what the mask is made of may change before it is read.
        tensors = tuple(value(node).clone() for node in proved.tensors)
        found = tuple(int(value(node)) for node in proved.numbers)
    return replace(proved, tensors=tensors, numbers=found)
