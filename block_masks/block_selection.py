"""BlockSelection: which blocks of one attention call are kept.

Symbols: B batch, Hq query heads, Nq/Nk query and key blocks, Sq/Skv tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_lists import BlockLists
from .geometry import BlockGeometry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockSelection:
    """The blocks kept for one attention call.

    Attributes:
        keep: bool [B, Hq, Nq, Nk], or [B, 1, Nq, Nk] where all heads share one selection.
        visible: bool, broadcastable to [B, Hq, Nq, Nk]: blocks that dense attention reads.
        geometry: Lengths, block size and causal alignment.
        lists: The same blocks as lists, where a kernel made them.
    """

    keep: Tensor
    visible: Tensor
    geometry: BlockGeometry
    lists: BlockLists | None = None

    def density(self) -> float:
        """Kept blocks over visible blocks, in [0, 1]; waits for the device."""
        return float(self.density_tensor())

    def density_tensor(self) -> Tensor:
        """Kept blocks over visible blocks as a 0-dim float32 tensor, without waiting."""
        keep, visible = torch.broadcast_tensors(self.keep, self.visible)
        return keep.sum() / visible.sum().clamp_min(1)

    def token_mask(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Expands the kept blocks to tokens; causality and the geometry's `mask` applied.

        Args:
            rows: Query rows to expand; all by default.
            keys: Keys to expand; all by default.

        Returns:
            bool [B, Hq or 1, rows, keys], True where the query attends to the key.
        """
        geometry, device = self.geometry, self.keep.device
        query = torch.arange(geometry.q_len, device=device)[rows]
        key = torch.arange(geometry.kv_len, device=device)[keys]
        size = geometry.block_size
        kept = self.keep[:, :, query // size][..., key // size]
        return kept & geometry.pairs(query, key) if geometry.hides_keys else kept

    def block_lists(self, *, partial_only: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The kept blocks as FlexAttention's lists, each block in exactly one of them.

        Args:
            partial_only: Lists every block as partial, for a ``mask_mod`` that says more than
                causality.

        Returns:
            ``kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices``: int32 counts
            [B, Hq or 1, Nq] and indices [B, Hq or 1, Nq, Nk], kept blocks first in ascending
            order, and after them anything. Full blocks need no ``mask_mod``; those on the
            diagonal or a ragged edge do.
        """
        if self.lists is not None and not partial_only:
            return self.lists.tensors()
        full = self.geometry.full_blocks(self.keep.device) & (not partial_only)
        return (*_compact(self.keep & ~full), *_compact(self.keep & full))


def _compact(blocks: Tensor) -> tuple[Tensor, Tensor]:
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return counts, order.to(torch.int32).contiguous()
