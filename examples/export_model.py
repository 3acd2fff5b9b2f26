"""Export an optimized model: the settings travel inside the program.

python examples/export_model.py [--tokens 16384] [--output model.pt2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisparse_flex
from unisparse_flex import UniSparse


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int = 128, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


def seconds(run: Callable[[], Any]) -> float:
    """The second of two runs: the first one compiles."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("model.pt2"))
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(1, options.tokens, 128)
    model = Attention().eval()
    with torch.no_grad():
        dense = torch.compile(model)
        dense_seconds = seconds(lambda: dense(x))
        # Random weights attend to every block a little: top_k says how many are kept.
        unisparse_flex.optimize(model, UniSparse(top_k=8), min_length=0)
        expected = model(x)
        program = torch.export.export(model, (x,))
        torch.export.save(program, options.output)
        # Elsewhere: `import unisparse_flex` registers the operator that the program holds.
        loaded = torch.export.load(options.output).module()
        found = loaded(x)
        compiled = torch.compile(loaded)
        sparse_seconds = seconds(lambda: compiled(x))
    error = (found - expected).norm() / expected.norm()
    print(f"saved {options.output}, relative difference after loading: {float(error):.1e}")
    print(f"compiled: dense {dense_seconds:.3f} s, the loaded program {sparse_seconds:.3f} s")


if __name__ == "__main__":
    main()
