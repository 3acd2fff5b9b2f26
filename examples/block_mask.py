"""The BlockMask alone, for a flex_attention call of your own.

python examples/block_mask.py [--tokens 16384]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import unisparse_flex


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
    query, key, value = (torch.randn(1, heads, tokens, 64) for heads in (4, 2, 2))
    with torch.no_grad():
        mask = unisparse_flex.create_block_mask(
            query, key, is_causal=True, selector=unisparse_flex.UniSparse(top_k=8)
        )
        compiled = torch.compile(flex_attention)

        def attend() -> Any:
            return compiled(query, key, value, block_mask=mask, enable_gqa=True)

        def attend_dense() -> Any:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

        output = attend()
        print(f"output {tuple(output.shape)}, {mask.sparsity():.0f}% of the blocks left out")
        print(f"dense {seconds(attend_dense):.3f} s, with the mask {seconds(attend):.3f} s")


if __name__ == "__main__":
    main()
