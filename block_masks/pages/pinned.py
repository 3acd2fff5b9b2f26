"""Which units of a prompt stay while it is answered: those that its last rows looked at.

What is kept of a unit's keys says little of a single one that differs from the others, and that is
what a question about a long text looks for. The end of a prompt has read all keys already.

Symbols: R rows of the prompt, Hkv key heads, G query heads of a key head, S keys, U keys of a unit.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .decode import DecodeSelector

# Rows at the end of a prompt that are asked.
PROMPT_ROWS = 16


def weigh_units(shares: Tensor, per_unit: int) -> Tensor:
    """How much of its attention any row and query head of a key head gives to each unit, at most.

    What lies in the second half of a unit counts for the next one too, but for the first unit: who
    copies a passage looks at what comes after it.

    Args:
        shares: [R, Hkv, G, n], the attention that parts of units have.
        per_unit: Parts of a unit, an even number that divides n.

    Returns:
        [Hkv, n / per_unit].
    """
    parts = shares.unflatten(-1, (-1, per_unit))
    whole, late = parts.sum(-1), parts[..., per_unit // 2 :].sum(-1)
    before = torch.cat([torch.zeros_like(late[..., :2]), late[..., 1:-1]], -1)
    return torch.maximum(whole, before).amax((0, 2))


def pin_units(weights: Tensor, length: int, selector: DecodeSelector) -> Tensor:
    """The units of the largest weights, without those that stay in any case.

    Args:
        weights: From `weigh_units`, [Hkv, units].
        length: Keys of the prompt.
        selector: With the unit of the weights; ``prompt_share`` of the keys are pinned.

    Returns:
        bool [Hkv, units].
    """
    rule = selector.rule
    count = -(-length // selector.unit)
    order = torch.arange(weights.shape[-1], device=weights.device)
    free = (order >= rule.sinks) & (order < count - rule.last)
    weights = weights.masked_fill(~free, -1.0)
    number = min(ceil(selector.prompt_share * count), weights.shape[-1])
    best = weights.topk(number, dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True) & (weights > 0)
