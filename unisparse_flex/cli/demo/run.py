"""One run of the demo: dense, then optimized, on the same prompt."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from ...clock import CpuWatch, in_turn
from ...evaluation import (
    CaptureAttention,
    CapturedAttention,
    Prefill,
    build_prompt,
    compute_recall,
    describe_device,
    load_smollm2,
    prefill,
)
from ...optimization import optimize
from ...progress import Progress
from ...reports import record_attention
from ...selectors import Selector
from ..choices import BUNDLED
from ..failures import any_failure
from .judge import Judge
from .options import DemoOptions
from .results import DemoResult, Layer, Row

CUDA_REPEATS = 5
WARM_UP_TOKENS = 256


def run_demo(options: DemoOptions, progress: Progress) -> DemoResult:
    """Runs everything that the demo shows.

    Args:
        options: Every knob.
        progress: Told about each step.
    """
    with progress.step("Load SmolLM2-135M-Instruct"), any_failure(f"load {BUNDLED}"):
        loaded = load_smollm2()
    with progress.step(f"Hide a needle in {options.tokens} tokens of {options.text}"):
        prompt = build_prompt(
            loaded.tokenizer,
            text=options.text,
            tokens=options.tokens,
            depth=options.depth,
            seed=options.seed,
        )
    on_cuda = loaded.device.type == "cuda"
    judge = Judge(loaded.tokenizer, prompt)
    input_ids = prompt.input_ids.to(loaded.device)

    def read(model: Callable[..., Any]) -> Prefill:
        return prefill(model, input_ids, logits_to_keep=judge.logits_to_keep)

    prefill(loaded.model, input_ids[:, :WARM_UP_TOKENS], logits_to_keep=1)
    dense, calls = _run_dense(loaded.model, read, judge, progress)
    layers = _select_layers(calls, options.build_selector(), progress)
    heads = calls[0].query.shape[1]
    calls.clear()
    rows, models = [dense], [loaded.model]
    if on_cuda if options.compile_dense is None else options.compile_dense:
        row, compiled = _run_dense_compiled(loaded.model, read, judge, progress)
        rows.append(row)
        models.append(compiled)
    row, optimized, decode_calls = _run_optimized(
        loaded.model, read, judge, options, layers, progress
    )
    rows.append(row)
    models.append(optimized)

    watch = CpuWatch()
    repeats = options.repeats or (CUDA_REPEATS if on_cuda else 1)
    with progress.step("Time the prefills in turn", repeats * len(models)) as advance:

        def clock(model: Callable[..., Any]) -> float:
            with watch.watching():
                seconds = read(model).seconds
            advance()
            return seconds

        turns = in_turn([partial(clock, model) for model in models], repeats=repeats)
    return DemoResult(
        prompt=prompt,
        judged=judge.positions,
        rows=tuple(
            dataclasses.replace(row, prefill_seconds=median(seconds))
            for row, seconds in zip(rows, turns, strict=True)
        ),
        layers=tuple(layers),
        heads=heads,
        repeats=repeats,
        decode_calls=decode_calls,
        notes=() if (busy := watch.say_busy(loaded.device)) is None else (busy,),
        device=describe_device(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def _run_dense(
    model: Any, read: Callable[..., Prefill], judge: Judge, progress: Progress
) -> tuple[Row, list[CapturedAttention]]:
    """The dense row, and the attention inputs of every layer."""
    with (
        progress.step("Dense: read the prompt", model.config.num_hidden_layers) as advance,
        CaptureAttention(on_call=advance) as capture,
    ):
        run = read(model)
    with progress.step("Dense: answer"):
        return judge.row(run, decoder=model, label="dense (eager)"), capture.calls


def _run_dense_compiled(
    model: Any, read: Callable[..., Prefill], judge: Judge, progress: Progress
) -> tuple[Row, Callable[..., Any]]:
    compiled = torch.compile(model)
    with progress.step("Dense, compiled: compile, read the prompt"):
        run = read(compiled)
    with progress.step("Dense, compiled: answer"):
        row = judge.row(run, decoder=model, label="dense (compiled)", compile_seconds=run.seconds)
    return row, compiled


def _run_optimized(
    model: Any,
    read: Callable[..., Prefill],
    judge: Judge,
    options: DemoOptions,
    layers: list[Layer],
    progress: Progress,
) -> tuple[Row, Callable[..., Any], Counter[tuple[str, str | None]]]:
    """The optimized row, its model, and how the calls of its decoding were decided."""
    selector = options.build_selector()
    name = type(selector).__name__
    # A copy: the dense model is still to be timed.
    optimized = optimize(
        copy.deepcopy(model), selector=selector, min_length=options.effective_min_length
    )
    runner = torch.compile(optimized) if options.compile else optimized
    action = "compile, read" if options.compile else "read"
    with progress.step(f"{name}: {action} the prompt"):
        run = read(runner)
    with progress.step(f"{name}: answer"), record_attention(optimized) as decode:
        row = judge.row(
            run,
            decoder=optimized,
            label=f"{name} ({'compiled' if options.compile else 'eager'})",
            compile_seconds=run.seconds if options.compile else None,
            density=sum(layer.density for layer in layers) / len(layers),
            recall=sum(layer.recall for layer in layers) / len(layers),
        )
    return row, runner, Counter((call.decision, call.reason) for call in decode)


def _select_layers(
    calls: list[CapturedAttention], selector: Selector, progress: Progress
) -> list[Layer]:
    """What the selector keeps of each layer, and how much dense attention that holds."""
    layers = []
    with progress.step("Recall of the selected blocks", len(calls)) as advance:
        for call in calls:
            selection = selector.select(call.query, call.key, is_causal=True, scale=call.scale)
            recall = compute_recall(
                call.query,
                call.key,
                selection.keep,
                block_size=selector.block_size,
                scale=call.scale,
            )
            kept = selection.keep[0].float().mean(0).cpu()
            layers.append(Layer(density=selection.density(), recall=recall, kept=kept))
            advance()
    return layers
