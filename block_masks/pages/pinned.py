"""Which units of a prompt stay while it is answered: those that its last rows looked at.

What is kept of a unit says little of one key that differs from the others, and that is what a
question about a long text looks for. The end of a prompt has read all of its keys.

Symbols: R rows of a prompt, Hq/Hkv heads, G query heads of a key head, S keys, U keys of a unit, D
head_dim.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .decode import DecodeSelector

# Rows at the end of a prompt that are asked.
PROMPT_ROWS = 16
# What a top-p is taken to keep.
USUAL_SHARE = 0.1
# Logits that are held at a time.
MOST_LOGITS = 1 << 25


def pin_prompt(
    query: Tensor, key: Tensor, *, length: int, selector: DecodeSelector, scale: float
) -> Tensor:
    """The units that stay while a prompt is answered.

    Args:
        query: [R, Hq, D], the last rows of the prompt.
        key: [Hkv, S, D], its keys in whole units; what lies after ``length`` is not read.
        length: Keys of the prompt, those of the rows included.
        selector: Says how many.
        scale: Factor on the logits.

    Returns:
        bool [Hkv, S / U].
    """
    rows, heads = query.shape[0], key.shape[0]
    # Keys that some row does not see lie from the first row's on.
    first = length - rows
    position = torch.arange(first, key.shape[1], device=key.device)
    hidden = position > torch.arange(first, length, device=key.device)[:, None, None]
    grouped = (query * scale).to(key.dtype).unflatten(1, (heads, -1)).transpose(0, 1)
    step = max(1, MOST_LOGITS // (query.shape[1] * key.shape[1]))
    weights = []
    for own, unseen in zip(grouped.split(step, 1), hidden.split(step), strict=True):
        # [Hkv, rows, G, S]
        logits = (own.flatten(1, 2) @ key.mT).unflatten(1, own.shape[1:3])
        logits[..., first:].masked_fill_(unseen, -torch.inf)
        shares = logits.softmax(-1, dtype=torch.float32).transpose(0, 1)
        weights.append(weigh_units(shares.unflatten(-1, (-1, selector.unit // 2)).sum(-1)))
    return pin_units(torch.stack(weights).amax(0), length, selector)


def weigh_units(shares: Tensor) -> Tensor:
    """How much of its attention any row and query head gives to each unit, at most.

    The second half of a unit counts for the next one too, unless it is the first unit's: who
    copies a passage looks at what comes after it.

    Args:
        shares: [R, Hkv, G, 2 * units], the attention that halves of units have.

    Returns:
        [Hkv, units].
    """
    whole, late = shares.unflatten(-1, (-1, 2)).sum(-1), shares[..., 1::2]
    before = torch.cat([torch.zeros_like(late[..., :2]), late[..., 1:-1]], -1)
    return torch.maximum(whole, before).amax((0, 2))


def pin_units(weights: Tensor, length: int, selector: DecodeSelector) -> Tensor:
    """The units of the largest weights, without those that stay in any case.

    Args:
        weights: From `weigh_units`, [Hkv, units].
        length: Keys of the prompt.
        selector: With the unit of the weights.

    Returns:
        bool [Hkv, units].
    """
    rule = selector.rule
    count = -(-length // selector.unit)
    order = torch.arange(weights.shape[-1], device=weights.device)
    free = (order >= rule.sinks) & (order < count - rule.last)
    weights = weights.masked_fill(~free, 0.0)
    best = weights.topk(count_pinned(count, selector), dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True) & (weights > 0)


def count_pinned(count: int, selector: DecodeSelector) -> int:
    """How many of a prompt's units are pinned for a key head, if so many can be."""
    rule = selector.rule
    kept = ceil(count * rule.share)
    if rule.budget >= 0:
        kept = min(kept, rule.budget)
    elif rule.share == 1.0 and rule.top_p < 1.0:
        kept = ceil(count * USUAL_SHARE)
    return int(selector.prompt_share * min(kept, count) + 0.5)
