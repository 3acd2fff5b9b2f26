"""The attention mass that dense attention gives each block, exactly.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, Nq/Nk blocks, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_masks import BlockGeometry, default_scale
from ..block_masks.masks import mask_4d
from ..passes.calls import SdpaCall

# Weights held at once: 16 MiB of float32.
WEIGHTS_PER_STEP = 2**22


@torch.no_grad()
def compute_block_mass(call: SdpaCall, geometry: BlockGeometry) -> Tensor:
    """Computes the softmax weights of every query row, summed over rows and keys of each block.

    One head and one chunk of query rows at a time: memory grows with the keys, not with the pairs.

    Args:
        call: query [B, Hq, Sq, D], key [B, Hkv, Skv, D], and what hides keys from rows.
        geometry: The block grid of the call.

    Returns:
        float32 [B, Hq, Nq, Nk] on query's device. A query block sums to its rows that see a key;
        rows that are not finite hold nothing.
    """
    batch, heads, q_len, head_dim = call.query.shape
    kv_len, size = call.key.shape[2], geometry.block_size
    scale = default_scale(head_dim) if call.scale is None else call.scale
    group, device = heads // call.key.shape[1], call.query.device
    mass = torch.zeros((batch, heads, geometry.num_q_blocks, geometry.num_kv_blocks), device=device)
    chunk = max(size, WEIGHTS_PER_STEP // kv_len // size * size)
    for start in range(0, q_len, chunk):
        rows = torch.arange(start, min(start + chunk, q_len), device=device)
        bias = _bias(call, geometry, rows)
        for b in range(batch):
            for head in range(heads):
                keys = call.key[b, head // group].float()
                logits = (call.query[b, head, rows].float() * scale) @ keys.T
                logits += bias[b % bias.shape[0], head % bias.shape[1]]
                weights = _pad_to_blocks(logits.softmax(-1).nan_to_num_(0.0), size)
                blocks = weights.unflatten(-1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))
                first = start // size
                mass[b, head, first : first + len(blocks)] = blocks
    return mass


def _pad_to_blocks(weights: Tensor, size: int) -> Tensor:
    """Zeros after the rows and the keys, up to whole blocks."""
    rows, keys = (-length % size for length in weights.shape)
    return F.pad(weights, (0, keys, 0, rows)) if rows or keys else weights


def _bias(call: SdpaCall, geometry: BlockGeometry, rows: Tensor) -> Tensor:
    """What is added to the logits of some rows: [1 or B, 1 or Hq, rows, Skv], -inf where hidden."""
    column = torch.arange(geometry.kv_len, device=rows.device)
    seen = geometry.pairs(rows, column)
    bias = torch.zeros_like(seen, dtype=torch.float32)
    if call.attn_mask is not None:
        own = mask_4d(call.attn_mask)
        own = own if own.shape[2] == 1 else own[:, :, rows]
        if own.dtype is torch.bool:
            seen = seen & own
        else:
            bias = bias + own.float()
    return bias.masked_fill(~seen, -torch.inf)
