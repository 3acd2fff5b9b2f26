"""Masks in graphs: captured, lifted, and compared with what the graph itself computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.passes.calls.nodes import recorded
from unisparse_flex.passes.calls.sdpa import is_sdpa
from unisparse_flex.passes.masks import ProvedMask, Unproved
from unisparse_flex.passes.masks.prove import lift_mask

from .graphs import MARKERS

Mask = Callable[[Tensor, Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """One attention call whose mask is made from query, key and an integer tensor."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        mask = self.mask(query, key, ids)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)


class Graph:
    """A graph that Dynamo captured, with the inputs of each call."""

    def __init__(self, run: Any, *, dynamic: bool | None = None) -> None:
        self.modules: list[fx.GraphModule] = []
        torch._dynamo.reset()
        self.run = torch.compile(run, backend=self._backend, fullgraph=True, dynamic=dynamic)
        self.values: dict[fx.Node, Any] = {}

    def _backend(self, gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.modules.append(gm)

        def run(*inputs: Any) -> Any:
            recorder = _Recorder(gm)
            result = recorder.run(*inputs)
            self.values = recorder.values
            return result

        return run

    @property
    def calls(self) -> list[fx.Node]:
        nodes = self.modules[-1].graph.nodes
        return [node for node in nodes if node.target in MARKERS or is_sdpa(node)]


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        kept = value.clone() if isinstance(value, Tensor) else value
        self.values[n] = kept
        return value


def mask_of(call: fx.Node) -> Any:
    return call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")


def lift(call: fx.Node) -> ProvedMask | Unproved:
    query, key = recorded(call.args[0]), recorded(call.args[1])
    assert query is not None
    assert key is not None
    return lift_mask(mask_of(call), (*query.shape[:3], key.shape[2]))


def visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min


def assert_lifts(graph: Graph, call: fx.Node) -> ProvedMask:
    """Asserts that the call's mask is proved, and is what the graph computed for it."""
    lifted = lift(call)
    assert isinstance(lifted, ProvedMask), lifted
    query, key = graph.values[call.args[0]], graph.values[call.args[1]]  # type: ignore[index]
    program = MaskProgram.parse(
        lifted.text,
        tensors=[graph.values[node] for node in lifted.tensors],
        numbers=[int(graph.values[node]) for node in lifted.numbers],
        batch=query.shape[0],
        q_len=query.shape[2],
        kv_len=key.shape[2],
    )
    pairs = program.pairs(torch.arange(query.shape[2]), torch.arange(key.shape[2]))
    expected = visible(graph.values[mask_of(call)])
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    expected = expected[(None,) * (4 - expected.dim())].expand(shape[0], -1, *shape[2:])
    assert torch.equal(pairs.expand(shape), expected[:, :1])
    assert expected.eq(expected[:, :1]).all()
    return lifted
