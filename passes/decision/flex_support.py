"""Which kernel FlexAttention compiles for a sparse call: FlashAttention-4's or its own."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec

import torch

from ..calls import SdpaCall, is_symbolic
from .refusals import needs_grad

# Up to this head_dim FlashAttention-4's tile on Hopper is a block of 128 queries and 128 keys; on
# Blackwell it has 256 queries.
FLASH_BLOCK, FLASH_LARGEST_HEAD_DIM, FLASH_HEAD_DIM_STEP = 128, 128, 16
FLASH_CAPABILITY = 9
_LOAD = re.compile(r"\bt\d+\[([^\]]*)\]")


def flex_backend(call: SdpaCall, block_size: int, backend: str) -> str:
    """FlexAttention's ``BACKEND`` option for a call.

    Args:
        call: A call that runs sparse.
        block_size: Tokens per block.
        backend: One of `config.BACKENDS`: ``"auto"`` takes FlashAttention-4 where it can.

    Returns:
        ``"FLASH"`` or ``"TRITON"``; not ``"AUTO"``, which gives few queries to a decoding kernel
        whose tile, all queries of a group, need not divide a block.

    Raises:
        NotImplementedError: ``backend`` is a kernel's name, and that cannot run the call.
    """
    device = call.query.device
    obstacle = device_obstacle(backend, device)
    if backend != "triton" and obstacle is None:
        obstacle = flash_obstacle(call, block_size)
    if obstacle is not None and backend != "auto":
        raise NotImplementedError(
            f"backend={backend!r} cannot run this call: {obstacle}; use backend='auto'"
        )
    return "FLASH" if backend != "triton" and obstacle is None else "TRITON"


def device_obstacle(backend: str, device: torch.device) -> str | None:
    """Why no call on a device can have the kernel of this name; ``None`` where some can."""
    if backend == "auto":
        return None
    if device.type == "cpu" or (backend == "flash" and device.type != "cuda"):
        return f"it needs a CUDA device, got {device}"
    if backend == "triton":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major != FLASH_CAPABILITY:
        return f"it needs compute capability {FLASH_CAPABILITY}, got {major}.{minor}"
    if not is_flash_installed():
        return "flash_attn.cute cannot be imported (pip install --pre flash-attn-4)"
    return None


def flash_obstacle(call: SdpaCall, block_size: int) -> str | None:
    """Why FlashAttention-4 cannot run a sparse call; ``None`` where it can."""
    query, value = call.query, call.value
    if (obstacle := device_obstacle("flash", query.device)) is not None:
        return obstacle
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {query.dtype}"
    if block_size != FLASH_BLOCK:
        return f"it needs block_size {FLASH_BLOCK}, got {block_size}"
    if query.shape[3] != value.shape[3] or not supports_head_dim(query.shape[3]):
        return (
            f"it needs a head_dim of at most {FLASH_LARGEST_HEAD_DIM}, a multiple of "
            f"{FLASH_HEAD_DIM_STEP} and the same for queries and values, got {query.shape[3]} and "
            f"{value.shape[3]}"
        )
    if call.attn_mask is not None:
        return (
            "it is used under masks that are formulas: torch does not know that it reads the "
            "tensors of a mask, and may free before what is computed of one here"
        )
    if "//" in call.mask:
        return "it is used under masks without chunks"
    if _reads_fixed_entries(call.mask):
        return (
            "it is used under masks that read tensors at rows, keys and batch elements, got a "
            "number as an index, which CuTe code cannot hold"
        )
    if any(map(is_symbolic, (call.causal_offset(), *(call.mask_numbers or ())))):
        # It would be a captured number computed from lengths, which CuTe code cannot hold.
        return "it needs a causal offset that is known when it is compiled, got one of the lengths"
    if needs_grad(call):
        return "its backward is not used for sparse blocks"
    return None


def reads_tensors(mask: str) -> bool:
    """Whether a mask, as `SdpaCall.mask` writes it, reads entries of tensors."""
    return _LOAD.search(mask) is not None


def _reads_fixed_entries(mask: str) -> bool:
    """Whether an index of what a mask reads is a number, or there is none."""
    indices = [index for load in _LOAD.findall(mask) for index in load.split(",")]
    return any(re.fullmatch(r"\s*-?\d*\s*", index) for index in indices)


def supports_head_dim(head_dim: int) -> bool:
    """Whether FlashAttention-4's tiles are our blocks at this head_dim."""
    return head_dim <= FLASH_LARGEST_HEAD_DIM and head_dim % FLASH_HEAD_DIM_STEP == 0


@cache
def is_flash_installed() -> bool:
    """Whether FlashAttention-4 is there."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False
