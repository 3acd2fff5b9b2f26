"""A plain PyTorch model: optimize, compile, see what runs sparse and how long it takes.

python examples/plain_pytorch.py [--tokens 16384]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisparse_flex
from unisparse_flex import UniSparse


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer with grouped heads."""

    def __init__(self, width: int = 256, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = packed.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


def seconds(run: Callable[[], Any]) -> float:
    """The second of two runs: the first one compiles."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    tokens = parser.parse_args().tokens
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    x = torch.randn(1, tokens, 256)
    with torch.no_grad():
        compiled = torch.compile(model)
        dense, dense_seconds = compiled(x), seconds(lambda: compiled(x))
        # Random weights attend to every block a little, so that the default would keep them all:
        # top_k says how many. min_length=0 makes every call sparse that can be. A trained model
        # needs neither: the default keeps what matters, the cost model decides where it pays.
        unisparse_flex.optimize(model, UniSparse(top_k=8), min_length=0)
        print(unisparse_flex.explain(model, x))
        compiled = torch.compile(model)
        sparse, sparse_seconds = compiled(x), seconds(lambda: compiled(x))
    error = (sparse - dense).norm() / dense.norm()
    print(f"relative difference from the dense model: {float(error):.1e}")
    print(f"compiled: dense {dense_seconds:.3f} s, sparse {sparse_seconds:.3f} s")


if __name__ == "__main__":
    main()
