"""What sparse attention does to the output of a model, as KL(dense || sparse).

Symbols: P positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Rows of [P, V] per step: keeps the temporaries small.
ROWS_PER_STEP = 128


def logits_of(output: Any) -> Tensor:
    """The logits [..., V] that a model returned.

    Raises:
        TypeError: It returned none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise TypeError(
            "for a kl the model must return logits [..., vocabulary] or something with .logits, "
            f"got {type(output).__name__}; give recall instead"
        )
    return logits


def sum_kl(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) in nats, summed over positions; both logits [..., V]."""
    total = 0.0
    pairs = zip(*(t.flatten(0, -2).split(ROWS_PER_STEP) for t in (dense, other)), strict=True)
    for rows in pairs:
        p, q = (chunk.float().log_softmax(-1) for chunk in rows)
        # What the dense model rules out weighs nothing.
        terms = (p.exp() * (p - q)).masked_fill_(p == -math.inf, 0.0)
        total += float(terms.sum(dtype=torch.float64))
    if math.isnan(total):
        raise ValueError(
            "for a kl the model must return finite logits, got NaN; give recall instead"
        )
    return total
