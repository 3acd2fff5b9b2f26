"""Answers to RULER-style tasks, dense and with a selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from unisparse_flex import Selector, optimize, restore
from unisparse_flex.evaluation import (
    LoadedModel,
    TaskName,
    TaskSample,
    build_task,
    score_samples,
)
from unisparse_flex.reports import record_attention

from .models import Subject


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
    return {name: score_samples(loaded, drawn) for name, drawn in samples.items()}
