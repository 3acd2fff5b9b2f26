"""The BlockMask alone, for a flex_attention call of your own.

python examples/block_mask.py [--tokens 2048]
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.attention.flex_attention import flex_attention

import unisparse_flex


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    tokens = parser.parse_args().tokens
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 64) for heads in (4, 2, 2))
    with torch.no_grad():
        mask = unisparse_flex.create_block_mask(
            query, key, is_causal=True, selector=unisparse_flex.UniSparse(top_k=4)
        )
        attend = torch.compile(flex_attention)
        output = attend(query, key, value, block_mask=mask, enable_gqa=True)
    print(mask)
    print(f"output {tuple(output.shape)}")


if __name__ == "__main__":
    main()
