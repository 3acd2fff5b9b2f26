"""`explain` on a GPU: what the rest of a model takes, by the GPU's own clock."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.api.models import create, embeddings
from unisparse_flex import UniSparse, explain, optimize
from unisparse_flex.clock import timed

pytestmark = pytest.mark.gpu


class Stack(nn.Module):
    """Wide layers around attention: nearly all of the time is theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList([nn.Linear(4096, 4096) for _ in range(8)])
        self.model = create(layers=1)

    def forward(self, x: Tensor, wide: Tensor) -> Tensor:
        for layer in self.wide:
            wide = layer(wide)
        return self.model(x) + wide.sum()


def test_the_rest_takes_what_the_gpu_takes() -> None:
    stack = Stack().eval().to("cuda", torch.bfloat16)
    model = optimize(stack, UniSparse(top_k=2), min_length=0)
    x = embeddings(1024).to("cuda", torch.bfloat16)
    wide = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)

    def layers() -> None:
        with torch.no_grad():
            for layer in model.wide:
                layer(wide)

    layers()
    times = [timed(layers, torch.device("cuda"))[1] for _ in range(5)]
    found = explain(model, x, wide)
    # Others may take the GPU before it or behind it, and the fastest run is one alone.
    seconds = min(times + [timed(layers, torch.device("cuda"))[1] for _ in range(5)])
    assert found.rest_ms is not None
    assert 0.7 * 1e3 * seconds < found.rest_ms < 2 * 1e3 * seconds
    assert found.prefill_ms is not None
