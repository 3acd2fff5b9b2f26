"""Prefill, greedy answers and what they are judged by: time, KL and perplexity.

Symbols: S prompt tokens, P judged positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import timed
from ..integrations.transformers_names import cache_name

logger = logging.getLogger(__name__)

# Rows of [P, V] per step: keeps the temporaries of the KL small.
_ROWS_PER_STEP = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prefill:
    """What one pass over the prompt left behind.

    Attributes:
        logits: [1, P, V], the last ones of the prompt.
        cache: Keys and values of the prompt, as the model returned them.
        seconds: From call to logits, the device's queue empty at both ends.
    """

    logits: Tensor
    cache: Any
    seconds: float


@torch.inference_mode()
def prefill(model: Callable[..., Any], input_ids: Tensor, *, logits_to_keep: int) -> Prefill:
    """Runs the prompt through a model with a fresh cache.

    Args:
        model: A Hugging Face causal language model, compiled or not.
        input_ids: [1, S].
        logits_to_keep: How many of the last positions get logits.
    """
    output, seconds = timed(
        lambda: model(input_ids, use_cache=True, logits_to_keep=logits_to_keep), input_ids.device
    )
    logger.debug("prefill of %d tokens: %.3f s", input_ids.shape[-1], seconds)
    return Prefill(logits=output.logits, cache=output[cache_name()], seconds=seconds)


@torch.inference_mode()
def generate_greedily(
    model: Callable[..., Any], start: Prefill, *, max_tokens: int, stop_ids: set[int]
) -> list[int]:
    """Continues the prompt with the likeliest tokens; ``start``'s cache grows by them.

    Args:
        model: Decodes; need not be the one that ran the prefill.
        start: The prefilled prompt.
        max_tokens: Most tokens to return.
        stop_ids: Tokens that end the answer, not returned.
    """
    answer: list[int] = []
    logits, before = start.logits, start.cache
    while len(answer) < max_tokens:
        token = logits[:, -1:].argmax(-1)  # [1, 1]
        if int(token) in stop_ids:
            break
        answer.append(int(token))
        if len(answer) < max_tokens:
            output = model(token, **{cache_name(): before}, use_cache=True, logits_to_keep=1)
            logits, before = output.logits, output[cache_name()]
    return answer


def compute_log_probs(logits: Tensor) -> Tensor:
    """Returns float32 log-probabilities [P, V] of logits [P, V]."""
    return torch.log_softmax(logits.float(), dim=-1)


def compute_kl(reference: Tensor, other: Tensor) -> float:
    """Returns the mean over positions of KL(reference || other), in nats.

    Args:
        reference: Log-probabilities [P, V].
        other: Log-probabilities [P, V].
    """
    total = 0.0
    for start in range(0, len(reference), _ROWS_PER_STEP):
        p, q = reference[start : start + _ROWS_PER_STEP], other[start : start + _ROWS_PER_STEP]
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(0.0, total / len(reference))  # rounding goes below zero


def compute_perplexity(log_probs: Tensor, targets: Tensor) -> float:
    """Returns the exponential of the mean negative log-likelihood.

    Args:
        log_probs: [P, V].
        targets: [P] int64, the token that follows each position.
    """
    picked = log_probs.gather(-1, targets[:, None])
    return math.exp(-float(picked.mean(dtype=torch.float64)))
