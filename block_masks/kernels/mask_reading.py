"""Masks of eager calls, read and turned by kernels in place of many operators of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import (
    SOME,
    TRUTHS,
    MaskContents,
    MaskFacts,
    describe_facts,
    pairs_of_mask,
)
from ..masks import read_mask as read_by_operators
from .operator import _device_obstacle, keys_obstacle, on_device
from .recording import Recordings

# Of entries that the kernels compare as they are.
ENTRIES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
# From row to row, or key to key: a part of a mask is addressed with 32 bits.
LARGEST_STEP = 2**24

_recordings = Recordings(64)


def read_mask(attn_mask: Tensor, *, q_len: int, kv_len: int) -> MaskContents | None:
    """`masks.read_mask`, by the kernels where they run.

    Args:
        attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv].
        q_len: Query rows Sq.
        kv_len: Keys Skv.

    Returns:
        What it says; ``None`` where no formula does.
    """
    if not _reads(attn_mask):
        return read_by_operators(attn_mask, q_len=q_len, kv_len=kv_len)
    mask = pairs_of_mask(attn_mask, kv_len)
    if mask is None:
        return None
    from .read import read

    with on_device(mask.device):
        kind = ("read", q_len)
        facts, *tables = _recordings.run(kind, (mask,), lambda: read(mask, q_len))
    offset, width, *found = facts.flatten(0, 1).amax(0).tolist()
    holds = {n: bool(number) == (n in SOME) for n, number in zip(TRUTHS, found, strict=False)}
    return describe_facts(MaskFacts(mask.shape[0], q_len, kv_len, offset, width, holds, *tables))


def turn_keys(
    valid: Tensor, *, batch: int, q_len: int, kv_len: int, block_size: int
) -> list[Tensor]:
    """The padding of a causal call turned out of the block grid, on the GPU; see `turn.turn`."""
    from .turn import turn

    sizes = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "block_size": block_size}
    kind = ("turn", *sizes.values())
    with on_device(valid.device):
        return list(_recordings.run(kind, (valid,), lambda: turn(valid, **sizes)))


def runs_mask_kernels(query: Tensor) -> bool:
    """Whether what is made of the mask of an eager call is made by kernels."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch._C._len_torch_dispatch_stack() and keys_obstacle(query) is None


def _reads(mask: Tensor) -> bool:
    """Whether the kernels read a mask."""
    if mask.device.type != "cuda" or mask.dtype not in ENTRIES or not mask.numel():
        return False
    if mask.dim() > 1 and max(mask.stride()[-2:]) > LARGEST_STEP:
        return False
    return _device_obstacle(mask.device.index or 0) is None
