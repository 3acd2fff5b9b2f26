"""Masks as tensors of pairs."""

from __future__ import annotations

from torch import Tensor


def mask_4d(attn_mask: Tensor) -> Tensor:
    """Views a mask that broadcasts to [B, Hq, Sq, Skv] with four axes, of size 1 where it had none.

    Returns:
        [1 or B, 1 or Hq, 1 or Sq, 1 or Skv]; nothing is copied.
    """
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
