"""Answers to RULER-style tasks, dense and with a selector."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from unisparse_flex import Selector, optimize, restore
from unisparse_flex.demo.measure import generate_greedily, prefill
from unisparse_flex.demo.model import LoadedModel

from .models import Subject
from .ruler import TaskName, TaskSample, build_task, score


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
        drawn: dict[str, list[TaskSample]] = {
            name: [_draw(loaded, name, tokens, seed + index) for index in range(samples)]
            for name in names
        }
        return cls(subject=subject, samples=drawn, dense=_scores(loaded, drawn))

    def judge(self, selector: Selector) -> dict[str, Any]:
        """Mean scores with ``selector``, and the dense ones beside them."""
        model = self.subject.loaded.model
        optimize(model, selector, min_length=0, dense_layers=self.subject.dense_layers)
        try:
            found = _scores(self.subject.loaded, self.samples)
        finally:
            restore(model)
        count = len(next(iter(self.samples.values())))
        return {"task_scores": found, "dense_scores": self.dense, "samples": count}


def _draw(loaded: LoadedModel, name: TaskName, tokens: int, seed: int) -> TaskSample:
    room = build_task(name, loaded.tokenizer, tokens=tokens, seed=seed).max_new_tokens
    return build_task(name, loaded.tokenizer, tokens=tokens - room, seed=seed)


def _scores(loaded: LoadedModel, samples: dict[str, list[TaskSample]]) -> dict[str, float]:
    return {
        name: mean(score(sample, _answer(loaded, sample)) for sample in drawn)
        for name, drawn in samples.items()
    }


def _answer(loaded: LoadedModel, sample: TaskSample) -> str:
    start = prefill(loaded.model, sample.input_ids.to(loaded.device), logits_to_keep=1)
    stop = {loaded.tokenizer.eos_token_id, loaded.tokenizer.bos_token_id}
    ids = generate_greedily(loaded.model, start, max_tokens=sample.max_new_tokens, stop_ids=stop)
    return str(loaded.tokenizer.decode(ids))
