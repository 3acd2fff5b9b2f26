"""FlexAttention's block lists: which kept blocks a query block has, as counts and indices.

Symbols: B batch, H query heads (or 1), Nq/Nk query and key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """The kept blocks of one attention call, each in exactly one of two lists.

    Attributes:
        kv_num_blocks: int32 [B, H, Nq], blocks whose pairs ``mask_mod`` must judge.
        kv_indices: int32 [B, H, Nq, Nk]; what lies after a row's count says nothing.
        full_kv_num_blocks: int32 [B, H, Nq], blocks that are visible whole.
        full_kv_indices: int32 [B, H, Nq, Nk].
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The lists in BlockMask's order."""
        return (
            self.kv_num_blocks,
            self.kv_indices,
            self.full_kv_num_blocks,
            self.full_kv_indices,
        )

    def kept(self) -> Tensor:
        """The blocks of both lists: bool [B, H, Nq, Nk]."""
        partial = _mark(self.kv_num_blocks, self.kv_indices)
        return partial | _mark(self.full_kv_num_blocks, self.full_kv_indices)


def _mark(counts: Tensor, indices: Tensor) -> Tensor:
    columns = indices.shape[-1]
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    # What is not listed goes to a column of its own.
    places = torch.where(listed, indices.long(), columns)
    blocks = torch.zeros(
        (*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device
    )
    return blocks.scatter(-1, places, True)[..., :columns]
