"""Masks as tensors of pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_4d(attn_mask: Tensor) -> Tensor:
    """Views a mask that broadcasts to [B, Hq, Sq, Skv] with four axes, of size 1 where it had none.

    Returns:
        [1 or B, 1 or Hq, 1 or Sq, 1 or Skv]; nothing is copied.
    """
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))


def visible_tokens(attn_mask: Tensor) -> Tensor:
    """Which (query, key) pairs take part.

    Args:
        attn_mask: bool (True takes part) or floating (added to the logits).

    Returns:
        bool of the same shape. An additive entry at the dtype's minimum or -inf takes no part.
    """
    if attn_mask.dtype is torch.bool:
        return attn_mask
    # Written so that a NaN takes part, and so reaches the output as in SDPA.
    return ~(attn_mask <= torch.finfo(attn_mask.dtype).min)


def nearest_valid(valid: Tensor) -> tuple[Tensor, Tensor]:
    """From every key on the next one of valid [Bm, Skv], and back from it the one before.

    Returns:
        Two int64 [Bm, Skv]; Skv and -1 where there is none.
    """
    key = torch.arange(valid.shape[-1], device=valid.device)
    following = torch.where(valid, key, valid.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return following, torch.where(valid, key, -1).cummax(-1).values
