"""Which kernel FlexAttention compiles for a sparse call: FlashAttention-4's or its own."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from .decision import needs_grad
from .sdpa import SdpaCall, is_symbolic

# FlashAttention-4's tile; with another head_dim its tiles differ from the sparse blocks.
FLASH_BLOCK, FLASH_HEAD_DIM = 128, 128
FLASH_CAPABILITIES = (9, 10)


def flex_backend(call: SdpaCall, block_size: int, backend: str) -> str:
    """FlexAttention's ``BACKEND`` option for a call.

    Args:
        call: A call that runs sparse.
        block_size: Tokens per block.
        backend: One of `config.BACKENDS`: ``"auto"`` takes FlashAttention-4 where it can.

    Returns:
        ``"FLASH"`` or ``"AUTO"``.

    Raises:
        NotImplementedError: ``backend`` is ``"flash"`` and it cannot run the call.
    """
    if backend == "triton":
        return "AUTO"
    obstacle = flash_obstacle(call, block_size)
    if obstacle is None:
        return "FLASH"
    if backend == "flash":
        raise NotImplementedError(
            f"backend='flash' cannot run this call: {obstacle}; use backend='auto'"
        )
    return "AUTO"


def flash_obstacle(call: SdpaCall, block_size: int) -> str | None:
    """Why FlashAttention-4 cannot run a sparse call; ``None`` where it can."""
    query, key, value = call.query, call.key, call.value
    lengths = (query.shape[0], query.shape[2], key.shape[2])
    if query.device.type != "cuda":
        return f"it needs a CUDA device, got {query.device}"
    major, minor = torch.cuda.get_device_capability(query.device)
    if major not in FLASH_CAPABILITIES:
        return f"it needs compute capability 9 or 10, got {major}.{minor}"
    if not is_flash_installed():
        return "flash_attn.cute cannot be imported (pip install --pre flash-attn-4)"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {query.dtype}"
    if block_size != FLASH_BLOCK:
        return f"it needs block_size {FLASH_BLOCK}, got {block_size}"
    if {query.shape[3], value.shape[3]} != {FLASH_HEAD_DIM}:
        return (
            f"it needs head_dim {FLASH_HEAD_DIM} for queries and values, got {query.shape[3]} and "
            f"{value.shape[3]}"
        )
    if call.attn_mask is not None or call.mask:
        return "it is used without masks other than causal ones"
    if any(is_symbolic(length) for length in lengths):
        return "it needs static lengths (torch.compile(dynamic=False))"
    if needs_grad(call):
        return "its backward is not used for sparse blocks"
    blocks = -(-query.shape[2] // FLASH_BLOCK)
    if blocks > 1 and (query.shape[2] - 1) // (blocks - 1) != FLASH_BLOCK:
        # It divides the rows by the blocks; a short call has several answers.
        return f"it cannot tell the block size from {query.shape[2]} queries in {blocks} blocks"
    return None


@cache
def is_flash_installed() -> bool:
    """Whether FlashAttention-4 is there."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False
