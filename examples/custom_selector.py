"""A selector of your own: which key blocks does a query block attend to?

python examples/custom_selector.py [--tokens 16384]

This one keeps, for each query block, the key blocks whose mean key is most similar to its mean
query. A selector is a frozen dataclass: it is hashed, printed and carried inside traced graphs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unisparse_flex
from unisparse_flex.block_masks import BlockGeometry, BlockSelection


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestMeans(unisparse_flex.Selector):
    """Blocks by cosine similarity of mean query and mean key.

    Attributes:
        block_size: Tokens per block.
        count: Blocks that a row keeps beside the diagonal and the first.
    """

    block_size: int = 128
    count: int = 4

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """Other calls stay dense in a model."""
        return causal and not masked

    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        """Traced under torch.compile: no loop over heads, no number read back to Python."""
        size = geometry.block_size
        group = query.shape[1] // key.shape[1]
        queries = self._means(query, geometry.num_q_blocks * size)
        keys = self._means(key, geometry.num_kv_blocks * size).repeat_interleave(group, dim=1)
        similarity = queries @ keys.transpose(-1, -2)
        visible = geometry.visible_blocks(query.device)[None, None]
        similarity = similarity.masked_fill(~visible, -2.0)
        count = min(self.count, geometry.num_kv_blocks)
        best = similarity.topk(count, dim=-1).indices
        keep = torch.zeros_like(similarity, dtype=torch.bool).scatter(-1, best, True)
        keep = keep | geometry.local_blocks(1, query.device)
        first = torch.arange(geometry.num_kv_blocks, device=query.device) == 0
        return BlockSelection(keep=(keep | first) & visible, visible=visible, geometry=geometry)

    def _means(self, tokens: Tensor, length: int) -> Tensor:
        padded = F.pad(tokens.float(), (0, 0, 0, length - tokens.shape[2]))
        return F.normalize(padded.unflatten(2, (-1, self.block_size)).mean(3), dim=-1)


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
    selector = NearestMeans(count=4)
    selection = selector.select(query, key, is_causal=True)
    compiled = torch.compile(unisparse_flex.attention)

    def attend() -> Tensor:
        found: Tensor = compiled(
            query, key, value, is_causal=True, enable_gqa=True, selector=selector
        )
        return found

    def attend_dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    output = attend()
    print(f"{selector} keeps {float(selection.density()):.0%} of the blocks")
    print(f"output {tuple(output.shape)}, finite: {bool(output.isfinite().all())}")
    print(f"dense {seconds(attend_dense):.3f} s, selected {seconds(attend):.3f} s")


if __name__ == "__main__":
    main()
