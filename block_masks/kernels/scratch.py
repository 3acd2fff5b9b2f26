"""What the kernels hand to each other.

Symbols: B batch, Hkv key heads, Nq query blocks, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..geometry import BlockGeometry


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tokens that stand for groups of tokens.

    Attributes:
        tokens: [B * Hkv, blocks * heads of the group * groups of a block, D], contiguous.
        size: Tokens in a group.
    """

    tokens: Tensor
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Attention mass before normalisation; a row's all have one factor, or those of a part have.

    A part whose total is negative stands for its absolute value; it, and its blocks, have a factor
    of their own: they are to be multiplied by 2 ** shift beside parts of positive totals.

    Attributes:
        blocks: [heads, reach, rows], bfloat16 or float32: of each key block up to the last that
            one of the rows sees.
        totals: float32 [heads, 4, splits, rows]: of all keys, in parts; of a row of several
            parts, where its total is negative, the shift, the key blocks to a part, and the key
            block that the first part begins with.
    """

    blocks: Tensor
    totals: Tensor


def reach_of(geometry: BlockGeometry, q_blocks: slice) -> int:
    """Key blocks up to the last that some row of these query blocks sees."""
    if geometry.causal_offset is None:
        return geometry.num_kv_blocks
    row = min(q_blocks.stop * geometry.block_size, geometry.q_len) - 1
    seen = (row + geometry.causal_offset) // geometry.block_size + 1
    return min(seen, geometry.num_kv_blocks)


def batch_stride(table: Tensor) -> int:
    """The step from batch element to batch element; 0 where all share one."""
    return 0 if table.shape[0] == 1 else table.stride(0)


def power_of_two(count: int) -> int:
    """The least power of two that is not below ``count``, of 1 or more."""
    return 1 << (count - 1).bit_length()
