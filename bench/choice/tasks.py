"""Tasks with known answers: prompts read by the blocks of a choice, answers generated densely.

python -m bench.choice.tasks --weights FILE.gguf [--tokens 8064] [--samples 80]
    [--choices NAME:THRESHOLD,...] [--prompts FILE]
python -m bench.choice.tasks --weights FILE.gguf --encode FILE

Prompts are those of `bench.quality`, drawn a little longer and cut between the needles to whole
blocks. A row of the file has the scores of some samples of one task; every choice reads the same
samples before the next ones are read, so that a cut run has as many of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from unisparse_flex.doctor import default_device
from unisparse_flex.evaluation import (
    Prefill,
    TaskName,
    TaskSample,
    Tokenizer,
    build_task,
    generate_together,
    load_gguf_tokenizer,
    prefill,
    score,
)

from ..record import FOLDER, Record
from .choices import Choice
from .curves import DEFAULT, DEFAULT_THRESHOLD
from .parts import BLOCK
from .reading import IMPLEMENTATION, Chooser, load

TASKS: tuple[TaskName, ...] = ("niah_single", "niah_multikey", "niah_multivalue")
DENSE = "dense"
# Tokens that may have to go, and those around them that must be plain text.
SPARE, AROUND = 64, 48


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choice.tasks", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as results call it")
    parser.add_argument("--weights", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=8064, help="of a prompt; whole blocks")
    parser.add_argument("--samples", type=int, default=80, help="of each task")
    parser.add_argument("--together", type=int, default=10, help="samples of a row")
    parser.add_argument("--answer", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--choices", default=f"{DENSE},{DEFAULT}:{DEFAULT_THRESHOLD}")
    parser.add_argument("--prompts", type=Path, help="as --encode wrote them")
    parser.add_argument("--encode", type=Path, help="writes the prompts, no more")
    parser.add_argument("--max-seconds", type=float, default=3000.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.tokens % BLOCK:
        parser.error(f"--tokens must be a multiple of {BLOCK}, got {options.tokens}")
    tokenizer = load_gguf_tokenizer(options.weights)
    if options.encode:
        drawn = draw(tokenizer, options.tokens, options.samples)
        torch.save(
            {name: [_packed(one) for one in some] for name, some in drawn.items()}, options.encode
        )
        return
    settings = [_setting(text) for text in options.choices.split(",")]
    chooser, device = Chooser(), default_device()
    model = load(options.weights, chooser, device)
    record = Record.create(
        "bench.choice.tasks",
        device.type,
        options.output or FOLDER / f"choice-{options.model}-{options.tokens}-tasks.json",
        options.max_seconds,
        model=options.model,
        tokens=options.tokens,
        answer=options.answer,
    )
    record.content |= {"benchmark": "choice", "part": "tasks"}
    with record.stopping():
        samples = _samples(tokenizer, options)
        for start in range(0, options.samples, options.together):
            for name in TASKS:
                some = samples[name][start : start + options.together]
                if record.stop_if_over():
                    return
                for row in ask(model, chooser, tokenizer, some, settings, options.answer):
                    record.add({"task": name, "first": start} | row)


def draw(tokenizer: Tokenizer, tokens: int, samples: int) -> dict[TaskName, list[TaskSample]]:
    """So many samples of each task, prompts of exactly so many tokens."""
    return {
        name: [
            cut(build_task(name, tokenizer, tokens=tokens + SPARE, seed=seed), tokenizer, tokens)
            for seed in range(samples)
        ]
        for name in TASKS
    }


def cut(sample: TaskSample, tokenizer: Any, tokens: int) -> TaskSample:
    """A sample whose prompt has exactly so many tokens: text goes where no needle is near.

    Raises:
        ValueError: There is no such place, or the prompt is shorter.
    """
    ids = sample.input_ids[0]
    spare = len(ids) - tokens
    if spare < 0:
        raise ValueError(f"tokens must be at most {len(ids)}, got {tokens}")
    for start in range(2 * AROUND, len(ids) - spare - 4 * AROUND, AROUND // 3):
        text = tokenizer.decode(ids[start - AROUND : start + spare + AROUND].tolist())
        if "magic" not in text and not any(answer in text for answer in sample.answers):
            left = torch.cat([ids[:start], ids[start + spare :]])
            return TaskSample(
                name=sample.name,
                input_ids=left[None],
                answers=sample.answers,
                max_new_tokens=sample.max_new_tokens,
            )
    raise ValueError(f"tokens must leave text between needles, got {tokens}")


def ask(
    model: Any,
    chooser: Chooser,
    tokenizer: Any,
    samples: Sequence[TaskSample],
    settings: Sequence[tuple[Choice | None, float | None]],
    longest: int,
) -> list[dict[str, Any]]:
    """A row for every setting: scores of the answers, and what was kept of the prompts."""
    starts: list[Prefill] = []
    rows: list[dict[str, Any]] = []
    for choice, threshold in settings:
        densities: list[Tensor] = []
        for sample in samples:
            ids = sample.input_ids.to(model.device)
            if choice is None or threshold is None:
                starts.append(prefill(model, ids, logits_to_keep=1))
                continue
            with chooser.set(choice, threshold):
                starts.append(prefill(model, ids, logits_to_keep=1))
            densities += chooser.densities
        rows.append(
            {
                "choice": DENSE if choice is None else choice.name,
                "threshold": threshold,
                "density": mean(float(one) for one in densities) if densities else 1.0,
            }
        )
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    model.set_attn_implementation("sdpa")
    try:
        answers = generate_together(model, starts, max_tokens=longest, stop_ids=stops)
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    for place, row in enumerate(rows):
        own = answers[place * len(samples) : (place + 1) * len(samples)]
        row["scores"] = [
            score(sample, tokenizer.decode(answer))
            for sample, answer in zip(samples, own, strict=True)
        ]
    return rows


def _setting(text: str) -> tuple[Choice | None, float | None]:
    """``NAME:THRESHOLD``, or dense attention."""
    if text == DENSE:
        return None, None
    name, _, threshold = text.rpartition(":")
    return Choice.parse(name), float(threshold)


def _samples(tokenizer: Tokenizer, options: Any) -> dict[TaskName, list[TaskSample]]:
    if options.prompts is None:
        return draw(tokenizer, options.tokens, options.samples)
    stored = torch.load(options.prompts)
    return {
        name: [
            TaskSample(
                name=name,
                input_ids=ids.long()[None],
                answers=answers,
                max_new_tokens=options.answer,
            )
            for ids, answers in stored[name]
        ]
        for name in TASKS
    }


def _packed(sample: TaskSample) -> tuple[Tensor, tuple[str, ...]]:
    return sample.input_ids[0].to(torch.uint16), sample.answers


if __name__ == "__main__":
    main()
