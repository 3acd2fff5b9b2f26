"""Left padding turned out of the block grid: the keys and rows of a turned mask.

Symbols: B batch, Bm that of the mask (1 or B), Sq/Skv tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .recording import empty

# Tokens that a program turns, and looks at in one step.
TOKENS = 1024


@triton.jit(do_not_specialize=["stride_b", "stride_s", "q_len", "kv_len"])
def _turn_keys(
    valid,
    shifts,
    keys,
    rows,
    stride_b,
    stride_s,
    q_len,
    kv_len,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Some tokens of one batch element; each program finds the first valid key anew."""
    batch = tl.program_id(1).to(tl.int64)
    line = valid + batch * stride_b
    first = kv_len
    start = 0
    while (start < kv_len) & (first == kv_len):
        key = start + tl.arange(0, TOKENS)
        here = tl.load(line + key.to(tl.int64) * stride_s, mask=key < kv_len, other=0) > 0
        first = tl.min(tl.where(here, key, kv_len), 0)
        start += TOKENS
    # Where no key is valid nothing is turned.
    shift = tl.where(first == kv_len, 0, first % BLOCK)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    source = tl.minimum(token + shift, kv_len - 1)
    here = tl.load(line + source.to(tl.int64) * stride_s, mask=token < kv_len, other=0) > 0
    # What came round is seen by nobody.
    here = here & (token < kv_len - shift)
    tl.store(keys + batch * kv_len + token, here.to(tl.uint8), mask=token < kv_len)
    exists = token < q_len - shift
    tl.store(rows + batch * q_len + token, exists.to(tl.uint8), mask=token < q_len)
    if tl.program_id(0) == 0:
        tl.store(shifts + batch, shift.to(tl.int64))


_launch = Launch(_turn_keys)


def turn(
    valid: Tensor, *, batch: int, q_len: int, kv_len: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How far each row of a batch is turned until its first valid key begins a block.

    Args:
        valid: bool [Bm, Skv], on the GPU.
        batch: B.
        q_len: Sq, up to Skv.
        kv_len: Skv.
        block_size: Tokens per block.

    Returns:
        int64 [B], below the block size; the turned keys that are valid, bool [B, Skv]; the turned
        rows that were not before them, bool [B, Sq].
    """
    entries = valid.view(torch.uint8)
    shift = empty(entries, (batch,), torch.int64)
    keys, rows = (empty(entries, (batch, length), torch.bool) for length in (kv_len, q_len))
    _launch(
        (-(-max(q_len, kv_len) // TOKENS), batch, 1),
        entries,
        shift,
        keys.view(torch.uint8),
        rows.view(torch.uint8),
        0 if valid.shape[0] == 1 else valid.stride(0),
        valid.stride(1),
        q_len,
        kv_len,
        BLOCK=block_size,
        TOKENS=TOKENS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return shift, keys, rows
