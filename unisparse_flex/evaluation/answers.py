"""Answers to tasks: prompts are read one by one, answers generated in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integrations.transformers_names import cache_name
from .measure import Prefill, generate_greedily, prefill
from .model import LoadedModel
from .ruler import score

# Answers that are generated in one batch, by device: their keys and values are in memory at once.
TOGETHER = {"cuda": 64, "cpu": 8}


class Sample(Protocol):
    """What is asked, as `TaskSample` has it."""

    @property
    def input_ids(self) -> Tensor:
        """[1, S] int64; the answer is the only thing missing."""

    @property
    def max_new_tokens(self) -> int:
        """How long the answer may be."""


def score_samples(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    score: Callable[[Any, str], float] = score,
    together: int | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> float:
    """The mean score of a model's answers to samples of one task.

    Args:
        loaded: The model that is asked, optimized or not.
        samples: Of one task.
        score: What an answer to a sample is worth; by default by RULER's rule.
        together: Answers that are generated in one batch; by default as `TOGETHER` says.
        on_sample: Called after each prompt has been read.
    """
    size = TOGETHER[loaded.device.type] if together is None else together
    return mean(
        score(sample, answer)
        for start in range(0, len(samples), size)
        for sample, answer in zip(
            samples[start : start + size],
            _answers(loaded, samples[start : start + size], on_sample),
            strict=True,
        )
    )


def _answers(
    loaded: LoadedModel, samples: Sequence[Sample], on_sample: Callable[[], None]
) -> list[str]:
    starts = []
    for sample in samples:
        starts.append(prefill(loaded.model, sample.input_ids.to(loaded.device), logits_to_keep=1))
        on_sample()
    options: dict[str, Any] = {
        "max_tokens": samples[0].max_new_tokens,
        "stop_ids": {loaded.tokenizer.eos_token_id, loaded.tokenizer.bos_token_id},
    }
    if any(getattr(layer, "is_sliding", True) for layer in starts[0].cache.layers):
        # Such a layer has dropped keys: where a row's padding would end is not known to the mask.
        answers = [generate_greedily(loaded.model, start, **options) for start in starts]
    else:
        answers = generate_together(loaded.model, starts, **options)
    return [str(loaded.tokenizer.decode(ids)) for ids in answers]


@torch.inference_mode()
def generate_together(
    model: Any, starts: Sequence[Prefill], *, max_tokens: int, stop_ids: set[int]
) -> list[list[int]]:
    """`generate_greedily` for several prompts in one batch, padded on the left.

    Args:
        model: A Hugging Face causal language model.
        starts: The prefilled prompts, with caches that hold every key.
        max_tokens: Most tokens of each answer.
        stop_ids: Tokens that end an answer, not returned.
    """
    lengths = [start.cache.get_seq_length() for start in starts]
    longest = max(lengths)
    cache = _stack([start.cache for start in starts], longest)
    device = starts[0].logits.device
    positions = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
    mask = torch.arange(longest, device=device) >= longest - positions  # [B, S]
    logits = torch.cat([start.logits[:, -1] for start in starts])  # [B, V]
    answers: list[list[int]] = [[] for _ in starts]
    going = set(range(len(starts)))
    for step in range(max_tokens):
        tokens = logits.argmax(-1)  # [B]
        for row, token in enumerate(tokens.tolist()):
            if token in stop_ids:
                going.discard(row)
            if row in going:
                answers[row].append(token)
        if not going or step + 1 == max_tokens:
            break
        mask = F.pad(mask, (0, 1), value=True)
        output = model(
            tokens[:, None],
            attention_mask=mask,
            position_ids=positions + step,
            **{cache_name(): cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = output.logits[:, -1], output[cache_name()]
    return answers


def _stack(caches: Sequence[Any], longest: int) -> Any:
    """One cache of several prompts, each ending at the last place."""
    from transformers import DynamicCache

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, longest - tensor.shape[2], 0))

    stacked = DynamicCache()
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys = torch.cat([padded(layer.keys) for layer in layers])
        values = torch.cat([padded(layer.values) for layer in layers])
        stacked.update(keys, values, index)
    return stacked
