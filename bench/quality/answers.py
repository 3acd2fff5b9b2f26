"""Answers to RULER-style tasks, dense and with a selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import Selector, optimize, restore
from unisparse_flex.evaluation import LoadedModel, Prefill, cache_name, generate_greedily, prefill
from unisparse_flex.reports import record_attention

from .models import Subject
from .ruler import TaskName, TaskSample, build_task, score

# Answers that are generated in one batch, by device: their keys and values are in memory at once.
TOGETHER = {"cuda": 64, "cpu": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """Samples of several tasks, the same for every selector.

    Attributes:
        subject: The model that is asked.
        samples: By task.
        dense: The dense model's mean score by task.
    """

    subject: Subject
    samples: dict[str, list[TaskSample]]
    dense: dict[str, float]

    @classmethod
    def create(
        cls, subject: Subject, names: list[TaskName], *, tokens: int, samples: int, seed: int
    ) -> Exam:
        """Draws ``samples`` of each task, with room for the answer in ``tokens``."""
        loaded = subject.loaded
        seeds = range(seed, seed + samples)
        drawn: dict[str, list[TaskSample]] = {
            name: _draw(loaded, name, tokens, seeds) for name in names
        }
        return cls(subject=subject, samples=drawn, dense=_scores(loaded, drawn))

    def judge(self, selector: Selector) -> dict[str, Any]:
        """Mean scores with ``selector``, the dense ones, and what was kept of the prompts."""
        model = self.subject.loaded.model
        optimize(model, selector, min_length=0, dense_layers=self.subject.dense_layers)
        try:
            with record_attention(model) as records:
                found = _scores(self.subject.loaded, self.samples)
        finally:
            restore(model)
        return {
            # Answers are generated densely.
            "density": mean(r.density for r in records if r.density is not None),
            "task_scores": found,
            "dense_scores": self.dense,
            "samples": len(next(iter(self.samples.values()))),
        }


def _draw(
    loaded: LoadedModel, name: TaskName, tokens: int, seeds: Sequence[int]
) -> list[TaskSample]:
    room = build_task(name, loaded.tokenizer, tokens=tokens, seed=seeds[0]).max_new_tokens
    return [build_task(name, loaded.tokenizer, tokens=tokens - room, seed=seed) for seed in seeds]


def _scores(loaded: LoadedModel, samples: dict[str, list[TaskSample]]) -> dict[str, float]:
    return {
        name: mean(
            score(sample, answer)
            for part in _parts(drawn, TOGETHER[loaded.device.type])
            for sample, answer in zip(part, _answers(loaded, part), strict=True)
        )
        for name, drawn in samples.items()
    }


def _parts(samples: Sequence[TaskSample], size: int) -> list[Sequence[TaskSample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _answers(loaded: LoadedModel, samples: Sequence[TaskSample]) -> list[str]:
    """The answers to samples of one task, whose prompts are read one by one."""
    starts = [
        prefill(loaded.model, sample.input_ids.to(loaded.device), logits_to_keep=1)
        for sample in samples
    ]
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
