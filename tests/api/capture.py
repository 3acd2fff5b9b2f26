"""What Dynamo captures: a backend that keeps its graphs, and a count of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from unisparse_flex.passes import SparseConfig

MARKERS = (torch.ops.unisparse.sdpa, torch.ops.unisparse.sdpa.default)


class Capture:
    """A backend that keeps every graph, then runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def configs(self) -> list[list[SparseConfig]]:
        """Settings of the marked calls of each graph, graphs inside it included."""
        return [
            [
                SparseConfig.decode(node.kwargs["config"])
                for module in gm.modules()
                if isinstance(module, fx.GraphModule)
                for node in module.graph.nodes
                if node.target in MARKERS
            ]
            for gm in self.graphs
        ]

    def marked(self) -> list[int]:
        """How many marked calls each graph holds."""
        return [len(configs) for configs in self.configs()]


def captured(model: Any, *inputs: Any, fullgraph: bool = True) -> Capture:
    """Captures one call of a model, in a Dynamo that knows nothing yet."""
    torch._dynamo.reset()
    capture = Capture()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=fullgraph)(*inputs)
    torch._dynamo.reset()
    return capture


class GraphCount:
    """How many graphs were compiled since it was made."""

    def __init__(self) -> None:
        self.before = counters["stats"]["unique_graphs"]

    def __int__(self) -> int:
        return counters["stats"]["unique_graphs"] - self.before


@contextmanager
def compiles(at_most: int) -> Iterator[None]:
    """Asserts how many graphs are compiled inside."""
    count = GraphCount()
    yield
    assert int(count) <= at_most
