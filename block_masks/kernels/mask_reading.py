"""Masks of eager calls, read and turned by kernels in place of many operators of PyTorch."""

from __future__ import annotations

import logging
from functools import cache

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
from .operator import MEASURED, _device_obstacle, keys_obstacle, on_device
from .recording import Recordings

logger = logging.getLogger(__name__)

# Tokens of the masks that a GPU proves itself with.
LENGTH = 300
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
    read = _read_by_kernels if _reads(attn_mask) else read_by_operators
    return read(attn_mask, q_len=q_len, kv_len=kv_len)


def _read_by_kernels(attn_mask: Tensor, *, q_len: int, kv_len: int) -> MaskContents | None:
    from .read import read

    mask = pairs_of_mask(attn_mask, kv_len)
    if mask is None:
        return None

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
    if torch._C._len_torch_dispatch_stack() or keys_obstacle(query) is not None:
        return False
    return _are_proved(query.device.index or 0)


def _reads(mask: Tensor) -> bool:
    """Whether the kernels read a mask."""
    if mask.device.type != "cuda" or mask.dtype not in ENTRIES or not mask.numel():
        return False
    if mask.dim() > 1 and max(mask.stride()[-2:]) > LARGEST_STEP:
        return False
    device = mask.device.index or 0
    return _device_obstacle(device) is None and _are_proved(device)


@cache
def _are_proved(device: int) -> bool:
    """Whether these kernels were measured on a GPU of this kind, or do there what PyTorch does."""
    if torch.cuda.get_device_capability(device) in MEASURED:
        return True
    found = find_reading_failure(torch.device("cuda", device))
    if found:
        logger.warning(
            "masks of eager calls are read by PyTorch on this GPU, as the kernels fail: %s; "
            "please report it",
            found,
        )
    return not found


def find_reading_failure(device: torch.device) -> str:
    """What the kernels do otherwise than PyTorch on a GPU with small masks; empty for nothing."""
    row = torch.arange(LENGTH, device=device)
    valid = row >= torch.tensor([[0], [131]], device=device)
    seen = (row <= row[:, None]) & (row // 90 == row[:, None] // 90) & valid[:, None]
    added = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
    try:
        for mask in (seen[:, None], added[:, None]):
            sizes = {"q_len": LENGTH, "kv_len": LENGTH}
            found = _read_by_kernels(mask, **sizes)
            expected = read_by_operators(mask, **sizes)
            assert expected is not None
            if found is None or found.text != expected.text:
                return f"they read {found and found.text!r} for {expected.text!r}"
            if not all(map(torch.equal, found.tensors, expected.tensors)):
                return f"they read other tables of {expected.text!r}"
        shift, keys, rows = turn_keys(valid, batch=2, q_len=LENGTH, kv_len=LENGTH, block_size=128)
        turned = row < LENGTH - shift[:, None]
        if shift.tolist() != [0, 3] or not turned.equal(rows):
            return "they turn rows otherwise"
        if not keys[1].equal(valid[1].roll(-3) & turned[1]):
            return "they turn keys otherwise"
    except Exception as error:
        # A compiler's or a launch's: whatever it is, PyTorch still reads.
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""
