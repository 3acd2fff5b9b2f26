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
    # Keys that some row does not see lie from the first row's on.
    first = length - query.shape[0]
    position = torch.arange(first, key.shape[1], device=key.device)
    hidden = position > torch.arange(first, length, device=key.device)[:, None, None]
    weights = weigh_rows(query, key, hidden, selector=selector, scale=scale)
    return pin_units(weights, length, selector)


def weigh_rows(
    query: Tensor, key: Tensor, hidden: Tensor, *, selector: DecodeSelector, scale: float
) -> Tensor:
    """What `weigh_units` finds for rows, not all of them at once.

    Args:
        query: [R, Hq, D].
        key: [Hkv, S, D].
        hidden: bool [R, 1, m], which of the last m keys a row does not see.
        selector: With the unit.
        scale: Factor on the logits.

    Returns:
        [Hkv, S / U].
    """
    heads, first = key.shape[0], key.shape[1] - hidden.shape[2]
    grouped = (query * scale).to(key.dtype).unflatten(1, (heads, -1)).transpose(0, 1)
    step = max(1, MOST_LOGITS // (query.shape[1] * key.shape[1]))
    weights = []
    for own, unseen in zip(grouped.split(step, 1), hidden.split(step), strict=True):
        # [Hkv, rows, G, S]
        logits = (own.flatten(1, 2) @ key.mT).unflatten(1, own.shape[1:3])
        logits[..., first:].masked_fill_(unseen, -torch.inf)
        shares = logits.softmax(-1, dtype=torch.float32).transpose(0, 1)
        weights.append(weigh_units(shares.unflatten(-1, (-1, selector.unit // 2)).sum(-1)))
    return torch.stack(weights).amax(0)


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


def pin_units(weights: Tensor, length: int | Tensor, selector: DecodeSelector) -> Tensor:
    """The units of the largest weights, without those that stay in any case.

    Args:
        weights: From `weigh_units`, [Hkv, units].
        length: Keys of the prompt; of an integer on a GPU nobody waits for it.
        selector: With the unit of the weights.

    Returns:
        bool [Hkv, units].
    """
    rule = selector.rule
    count = -(-length // selector.unit)
    order = torch.arange(weights.shape[-1], device=weights.device)
    free = (order >= rule.sinks) & (order < count - rule.last)
    weights = weights.masked_fill(~free, 0.0)
    if isinstance(count, Tensor):
        best = weights.argsort(dim=-1, descending=True, stable=True)
        taken = (order < count_pinned_on_device(count, selector)).expand_as(best)
    else:
        best = weights.topk(count_pinned(count, selector), dim=-1).indices
        taken = torch.ones_like(best, dtype=torch.bool)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, taken) & (weights > 0)


def count_pinned(count: int, selector: DecodeSelector) -> int:
    """How many of a prompt's units are pinned for a key head, if so many can be."""
    rule = selector.rule
    kept = ceil(count * rule.share)
    if rule.budget >= 0:
        kept = min(kept, rule.budget)
    elif rule.share == 1.0 and rule.top_p < 1.0:
        kept = ceil(count * USUAL_SHARE)
    return int(selector.prompt_share * min(kept, count) + 0.5)


def count_pinned_on_device(count: Tensor, selector: DecodeSelector) -> Tensor:
    """`count_pinned` of one integer where it is."""
    rule = selector.rule
    units = count.double()
    kept = (units * rule.share).ceil()
    if rule.budget >= 0:
        kept = kept.clamp(max=rule.budget)
    elif rule.share == 1.0 and rule.top_p < 1.0:
        kept = (units * USUAL_SHARE).ceil()
    return (selector.prompt_share * torch.minimum(kept, units) + 0.5).floor().to(count.dtype)
