"""Quality against density of every selector, on a real model and real texts.

python -m bench.quality [--model smollm2] [--tokens 8192] [--texts prose,code]
    [--seeds 0,1,2] [--selectors NAME,...] [--spread] [--tasks niah_single,...]
    [--samples 50] [--output FILE]
python -m bench.quality --model gemma3-270m --weights FILE.gguf --tokens 32768

Each point reads the text once with a selector at one setting and compares the next-token
distributions of the last tokens, or of tokens all over it, with the dense model's. Density is what
that run kept. Recall, the output's error and the share of selection in the time are those of a few
layers' calls as the dense model makes them, on the first excerpt of each text: recall and error the
mean of them, the share that of the middle one (bench/quality/selection_share.py says what is
timed). Tasks are scored with the same settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import Selector, optimize, restore
from unisparse_flex.evaluation import (
    TASK_NAMES,
    TEXT_NAMES,
    CaptureAttention,
    CapturedAttention,
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    compute_recall_and_error,
)
from unisparse_flex.reports import record_attention

from ..calls import without_copies
from ..excerpts import encode_excerpt
from ..record import FOLDER, Record, guarded
from .answers import Exam
from .models import MODELS, Subject, load
from .selection_share import ShareClock, middle
from .sweeps import SWEEPS
from .trials import TRIALS

Judge = Callable[[Selector], dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--weights", type=Path, help="a GGUF file, where no package holds them")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--judged", type=int, default=1024, help="last tokens that are judged")
    parser.add_argument(
        "--spread", action="store_true", help="judges as many, spread evenly over the text"
    )
    parser.add_argument("--texts", default="prose,code", help=f"of {','.join(TEXT_NAMES)}")
    parser.add_argument("--seeds", default="0", help="excerpts of each text")
    parser.add_argument(
        "--selectors",
        default=",".join(SWEEPS),
        help=f"of {','.join(SWEEPS)}, and trial-GRANULARITY-RULE as in bench/quality/trials.py",
    )
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="takes every n-th point of a sweep")
    parser.add_argument(
        "--recall-layers",
        type=int,
        default=4,
        help="evenly spread layers for recall and error, means, and a time, the middle's; 0: none",
    )
    parser.add_argument(
        "--compile-selection",
        action="store_true",
        help="times selection without kernels compiled, up to a minute more for each selector",
    )
    parser.add_argument("--tasks", default="", help=f"of {','.join(TASK_NAMES)}")
    parser.add_argument("--samples", type=int, default=50, help="samples of each task")
    parser.add_argument("--max-seconds", type=float, default=3000.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)

    names = options.selectors.split(",")
    sweeps = SWEEPS | TRIALS
    unknown = sorted(set(names) - set(sweeps))
    if unknown:
        parser.error(f"--selectors must be of {', '.join(sweeps)}, got {', '.join(unknown)}")
    try:
        subject = load(options.model, options.weights)
    except ValueError as error:
        parser.error(str(error))
    loaded = subject.loaded
    settings = {name: sweeps[name](options.block_size)[:: options.every] for name in names}
    clock = ShareClock(list(settings.values()), options.compile_selection)
    output = options.output or FOLDER / f"quality-{subject.name}-{options.tokens}.json"
    record = Record.create(
        "bench.quality",
        loaded.device.type,
        output,
        options.max_seconds,
        model=subject.name,
        dense_layers=subject.dense_layers,
        tokens=options.tokens,
        judged=options.judged,
        spread=options.spread,
        recall_layers=options.recall_layers,
        selection_timed_at={name: repr(middle(sweep)) for name, sweep in settings.items()},
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    with record.stopping():
        for labels, judge in _judges(subject, clock, options):
            for name, selectors in settings.items():
                for selector in selectors:
                    if record.stop_if_over():
                        return
                    row = {"selector": name, "parameters": repr(selector), **labels}
                    record.add(row | (guarded(row, "judge", partial(judge, selector)) or {}))


def _judges(
    subject: Subject, clock: ShareClock, options: Any
) -> Iterator[tuple[dict[str, Any], Judge]]:
    """What judges a selector: one for every excerpt, then one for all tasks."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for text in filter(None, options.texts.split(",")):
        for seed in seeds:
            layers = options.recall_layers if seed == seeds[0] else 0
            reading = Reading.create(
                subject,
                clock,
                text,
                seed,
                tokens=options.tokens,
                judged=options.judged,
                spread_out=options.spread,
                recall_layers=layers,
            )
            yield {"text": text, "seed": seed}, reading.judge
    if options.tasks:
        exam = Exam.create(
            subject,
            options.tasks.split(","),
            tokens=options.tokens,
            samples=options.samples,
            seed=seeds[0],
        )
        yield {"text": None, "seed": seeds[0]}, exam.judge


class Reading:
    """A text as the dense model reads it, and how well a selector reads it."""

    def __init__(
        self,
        subject: Subject,
        clock: ShareClock,
        input_ids: Tensor,
        positions: Tensor,
        recall_layers: int,
    ) -> None:
        """``positions``, int64 [judged], are tokens whose predictions of the next are judged."""
        self.subject, self.model = subject, subject.loaded.model
        self.clock, self.input_ids, self.positions = clock, input_ids, positions
        with _captured(recall_layers) as calls:
            self.dense = self._read()
        self.calls = calls
        self.targets = input_ids[0, positions + 1]
        self.perplexity = compute_perplexity(self.dense, self.targets)

    @classmethod
    def create(
        cls,
        subject: Subject,
        clock: ShareClock,
        text: Any,
        seed: int,
        *,
        tokens: int,
        judged: int,
        spread_out: bool,
        recall_layers: int,
    ) -> Reading:
        """Reads exactly ``tokens`` tokens of an excerpt that ``seed`` picks."""
        input_ids = encode_excerpt(subject.loaded, text, tokens=tokens, seed=seed)
        # The last token predicts none of the text.
        places = spread(tokens - 1, judged) if spread_out else range(tokens - 1)[-judged:]
        positions = torch.tensor(list(places), device=input_ids.device)
        return cls(subject, clock, input_ids, positions, recall_layers)

    def judge(self, selector: Selector) -> dict[str, Any]:
        """Density, KL and perplexity ratio of the text read with ``selector``.

        With captured calls also their recall and error of the output, and the share of selection
        in the middle one's time.
        """
        optimize(self.model, selector, min_length=0, dense_layers=self.subject.dense_layers)
        try:
            with record_attention(self.model) as records:
                found = self._read()
        finally:
            restore(self.model)
        kept = [record.density for record in records if record.density is not None]
        perplexity = compute_perplexity(found, self.targets)
        row: dict[str, Any] = {
            "density": sum(kept) / len(kept),
            "kl": compute_kl(self.dense, found),
            "perplexity": perplexity,
            "perplexity_ratio": perplexity / self.perplexity,
        }
        if self.calls:
            row |= self._compare_calls(selector)
            row |= guarded(row, "selection_share", partial(self._share, selector)) or {}
        return row

    def _share(self, selector: Selector) -> dict[str, Any]:
        kv_heads = self.model.config.num_key_value_heads
        call = self.calls[len(self.calls) // 2]
        return self.clock.measure(selector, without_copies(call, kv_heads))

    @torch.inference_mode()
    def _read(self) -> Tensor:
        """Log-probabilities [judged, V] of the tokens after ``positions``."""
        output = self.model(self.input_ids, use_cache=False, logits_to_keep=self.positions)
        return compute_log_probs(output.logits[0])

    @torch.inference_mode()
    def _compare_calls(self, selector: Selector) -> dict[str, float]:
        """Recall and relative error of the output, means over the captured calls."""
        found = []
        for call in self.calls:
            kept = selector.select(call.query, call.key, is_causal=True, scale=call.scale).keep
            blocks: Any = {"block_size": selector.block_size, "scale": call.scale}
            found.append(compute_recall_and_error(call.query, call.key, call.value, kept, **blocks))
        recalls, errors = zip(*found, strict=True)
        return {"recall": mean(recalls), "output_error": mean(errors)}


@contextmanager
def _captured(wanted: int) -> Iterator[list[CapturedAttention]]:
    """Inputs of ``wanted`` causal calls, evenly spread, in a list filled at the end."""
    calls: list[CapturedAttention] = []
    if not wanted:
        yield calls
        return
    with CaptureAttention() as capture:
        yield calls
    calls += [capture.calls[place] for place in spread(len(capture.calls), wanted)]


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of the places 0 to ``count`` - 1, or all: the middles of equal parts."""
    wanted = min(wanted, count)
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
