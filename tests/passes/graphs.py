"""Attention calls as graphs: how they are spelled, and how they are captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from unisparse_flex import Selector
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.selectors import BlockSelection

ATEN = torch.ops.aten.scaled_dot_product_attention
MARKERS = (torch.ops.unisparse.sdpa, torch.ops.unisparse.sdpa.default)


class Calls(nn.Module):
    """A module whose forward is one function of query, key and value."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.function(query, key, value)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, is_causal=True, value=v
    ),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, is_causal=True),
    "aten": lambda q, k, v: ATEN(q, k, v, None, 0.0, True),
    "aten overload": lambda q, k, v: ATEN.default(q, k, v, is_causal=True),
}


def capture_dynamo(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


def capture_fx(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(module)


def capture_export(module: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, inputs)


TRACERS: dict[str, Callable[..., Any]] = {
    "dynamo": capture_dynamo,
    "fx": capture_fx,
    "export": capture_export,
}


def run(graph: Any, *inputs: Tensor) -> Any:
    """Runs what a tracer returned; a single output is taken out of its tuple."""
    module = graph.module() if isinstance(graph, torch.export.ExportedProgram) else graph
    output = module(*inputs)
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


def targets(graph: Any) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def count_markers(graph: Any) -> int:
    return sum(target in MARKERS for target in targets(graph))


def build_graph(call: SdpaCall, target: Callable[..., Any], **options: Any) -> fx.Graph:
    """A graph of one call whose inputs have the call's tensors recorded, as Dynamo does."""
    graph = fx.Graph()

    def placeholder(name: str, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        node = graph.placeholder(name)
        node.meta["example_value"] = tensor
        return node

    names = ("query", "key", "value", "attn_mask")
    arguments = [placeholder(name, getattr(call, name)) for name in names]
    keywords: dict[str, Any] = {"scale": call.scale, "enable_gqa": call.enable_gqa, **options}
    graph.output(
        graph.call_function(target, (*arguments, call.dropout_p, call.is_causal), keywords)
    )
    return graph


@dataclass(frozen=True, kw_only=True)
class Stripes(Selector):
    """A selector as a user writes one: the diagonal blocks and some columns."""

    block_size: int = 16
    columns: tuple[int, ...] = (0,)
    label: str | None = None

    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        visible = geometry.visible_blocks(query.device)
        keep = geometry.local_blocks(1, query.device)
        for column in self.columns:
            keep = keep | (torch.arange(geometry.num_kv_blocks, device=query.device) == column)
        keep = (keep & visible)[None, None].expand(query.shape[0], 1, -1, -1)
        return BlockSelection(keep=keep, visible=visible, geometry=geometry)
