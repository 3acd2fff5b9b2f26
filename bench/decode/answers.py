"""Answers to RULER-style tasks that the dense model solves, decoded from a part of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unisparse_flex.evaluation import (
    Prefill,
    TaskName,
    TaskSample,
    build_task,
    generate_together,
    score,
)

from ..quality import Subject
from .attention import Setting, decoding
from .continuation import Prompt, decode, read_prompt

# Prompts whose dense answers are generated in one batch, by device: their caches are in memory
# twice.
TOGETHER = {"cpu": 4, "cuda": 64}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Solved:
    """A sample whose answer the model finds when it decodes densely.

    Attributes:
        sample: The task.
        start: The prompt as the model read it.
        answer: The tokens of the dense answer, up to the last one that it is scored by.
    """

    sample: TaskSample
    start: Prompt
    answer: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """Samples of one task after one kind of prefill, all of them solved by dense decoding.

    Attributes:
        subject: The model that is asked.
        name: The task.
        drawn: Samples that were drawn.
        solved: Those whose answer holds all that is asked for.
    """

    subject: Subject
    name: TaskName
    drawn: int
    solved: list[Solved]

    @classmethod
    def create(
        cls,
        subject: Subject,
        name: TaskName,
        *,
        kind: str,
        tokens: int,
        samples: int,
        answer_tokens: int | None = None,
    ) -> Exam:
        """Draws ``samples`` with prompts of at most ``tokens`` tokens less the longest answer.

        Args:
            subject: The model that is asked.
            name: The task.
            kind: Of prefill.
            tokens: Of a prompt and its answer.
            samples: How many.
            answer_tokens: Of the longest answer; as the task has it when omitted.
        """
        loaded = subject.loaded
        room = build_task(name, loaded.tokenizer, tokens=tokens, seed=0).max_new_tokens
        drawn = [
            build_task(name, loaded.tokenizer, tokens=tokens - room, seed=seed)
            for seed in range(samples)
        ]
        if answer_tokens is not None:
            room = min(room, answer_tokens)
            drawn = [replace(sample, max_new_tokens=room) for sample in drawn]
        solved = []
        size = TOGETHER[loaded.device.type]
        for first in range(0, samples, size):
            part = drawn[first : first + size]
            starts = [read_prompt(subject, one.input_ids.to(loaded.device), kind) for one in part]
            # The caches are stacked as copies.
            answers = generate_together(
                loaded.model, starts, max_tokens=room, stop_ids=stop_ids(subject)
            )
            for sample, start, answer in zip(part, starts, answers, strict=True):
                needed = shortest_solution(subject, sample, answer)
                if needed is not None:
                    solved.append(Solved(sample=sample, start=start, answer=answer[:needed]))
        return cls(subject=subject, name=name, drawn=samples, solved=solved)

    def judge(self, setting: Setting) -> dict[str, Any]:
        """The share of all that is asked for that is still answered; answers are greedy.

        The dense answer is decoded with teacher forcing. Where the likeliest token is another one,
        greedy decoding goes on from there, so every answer is the one that decoding token by token
        would give.
        """
        model, found, strayed = self.subject.loaded.model, [], []
        with decoding(model, setting) as decoder:
            for one in self.solved:
                if decoder is not None:
                    decoder.observed = [one.start.observed]
                begun = self._follow(one)
                if begun is None:
                    found.append(1.0)
                else:
                    strayed.append((one, *begun))
            if decoder is not None:
                decoder.observed = [one.start.observed for one, _, _ in strayed]
            found += self._finish(strayed)
        return {
            "answers_kept": sum(found) / len(found),
            "same_answers": 1 - len(strayed) / len(found),
            "solved": len(self.solved),
            "drawn": self.drawn,
        } | ({"kept": 1.0, "recall": 1.0} if decoder is None else decoder.row())

    def _follow(self, one: Solved) -> tuple[list[int], Prefill] | None:
        """Tokens before the first that differs, and where decoding stands; ``None`` without any."""
        answer = torch.tensor(one.answer, device=one.start.logits.device)
        logits, cache = decode(self.subject, answer[None, :-1], one.start.cache)
        logits = torch.cat([one.start.logits[0, -1:], logits])
        differs = (logits.argmax(-1) != answer).nonzero()
        if len(differs) == 0:
            return None
        place = int(differs[0])
        if len(answer) - 1 - place:
            cut(cache, one.sample.input_ids.shape[1] + place)
        return one.answer[:place], Prefill(
            logits=logits[None, place : place + 1], cache=cache, seconds=0.0
        )

    def _finish(self, strayed: Sequence[tuple[Solved, list[int], Prefill]]) -> list[float]:
        if not strayed:
            return []
        room = strayed[0][0].sample.max_new_tokens
        rest = generate_together(
            self.subject.loaded.model,
            [start for _, _, start in strayed],
            max_tokens=room - min(len(before) for _, before, _ in strayed),
            stop_ids=stop_ids(self.subject),
        )
        decode_ids = self.subject.loaded.tokenizer.decode
        return [
            score(one.sample, decode_ids((before + more)[:room]))
            for (one, before, _), more in zip(strayed, rest, strict=True)
        ]


def stop_ids(subject: Subject) -> set[int]:
    """Tokens that end an answer."""
    tokenizer = subject.loaded.tokenizer
    return {tokenizer.eos_token_id, tokenizer.bos_token_id}


def shortest_solution(subject: Subject, sample: TaskSample, answer: Sequence[int]) -> int | None:
    """Tokens of an answer after which it holds all that is asked for; ``None`` for never."""
    decode_ids = subject.loaded.tokenizer.decode
    for count in range(1, len(answer) + 1):
        if score(sample, decode_ids(answer[:count])) == 1.0:
            return count
    return None


def cut(cache: Any, length: int) -> None:
    """Leaves the first ``length`` keys of a cache without windows."""
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, :length]
        layer.values = layer.values[:, :, :length]
