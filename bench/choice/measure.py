"""Density and KL against what choosing costs, for many choices on a real model.

python -m bench.choice --weights FILE.gguf [--model smollm2] [--tokens 8192] [--texts prose,code]
    [--choices NAME,... | --choices-file FILE] [--thresholds 0.006,...] [--ids FILE]
python -m bench.choice --weights FILE.gguf --texts prose,code --encode FILE

Attention of every layer without a sliding window reads the chosen blocks and no others; the next
layer sees what comes of it. `bench/choice/choices.py` says how a choice is called. KL is that of
the last tokens' predictions to the dense model's, in nats; density is what all those layers kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisparse_flex.doctor import default_device
from unisparse_flex.evaluation import (
    LoadedModel,
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    load_gguf_tokenizer,
)

from ..excerpts import encode_excerpt
from ..record import FOLDER, Record, guarded, numbers
from .choices import Choice
from .reading import Chooser, load

DEFAULT = "none/r4+p16"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choice", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as results call it")
    parser.add_argument("--weights", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--judged", type=int, default=1024, help="last tokens that are judged")
    parser.add_argument("--texts", default="topics,code,prose")
    parser.add_argument("--seeds", type=numbers(int), default=(0,), help="excerpts of each text")
    parser.add_argument("--choices", default=DEFAULT)
    parser.add_argument("--choices-file", type=Path, help="instead, see _groups")
    parser.add_argument("--thresholds", type=numbers(float), default=(0.006, 0.003, 0.012))
    parser.add_argument("--ids", type=Path, help="tokens of the texts, as --encode wrote them")
    parser.add_argument("--encode", type=Path, help="writes the tokens of the texts, no more")
    parser.add_argument("--max-seconds", type=float, default=3000.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    texts, device = list(product(options.texts.split(","), options.seeds)), default_device()
    if options.encode:
        torch.save(
            {f"{text} {seed}": encode(options, text, seed).int() for text, seed in texts},
            options.encode,
        )
        return
    lines = options.choices.split(",")
    if options.choices_file is not None:
        lines = options.choices_file.read_text().splitlines()
    try:
        groups = _groups(lines, options.thresholds)
    except ValueError as error:
        parser.error(str(error))

    chooser = Chooser()
    model = load(options.weights, chooser, device)
    stored = torch.load(options.ids) if options.ids else {}
    record = Record.create(
        "bench.choice",
        device.type,
        options.output or FOLDER / f"choice-{options.model}-{options.tokens}.json",
        options.max_seconds,
        model=options.model,
        tokens=options.tokens,
        judged=options.judged,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
    )
    with record.stopping():
        readings = {}
        for text, seed in texts:
            ids = stored[f"{text} {seed}"] if stored else encode(options, text, seed)
            ids = ids[:, : options.tokens].long().to(device)
            readings[text, seed] = Reading(model, chooser, ids, options.judged)
        for choice, threshold in _in_turn(groups):
            for (text, seed), reading in readings.items():
                if record.stop_if_over():
                    return
                row = {"choice": choice.name, "threshold": threshold, "text": text, "seed": seed}
                judge = partial(reading.judge, choice, threshold)
                record.add(row | (guarded(row, "judge", judge) or {}))


Setting = tuple[Choice, Sequence[float]]


def _groups(lines: Sequence[str], thresholds: Sequence[float]) -> list[list[Setting]]:
    """Choices and their thresholds, which may stand after them; an empty line ends a group."""
    groups: list[list[Setting]] = [[]]
    for line in lines:
        if not line.strip():
            groups.append([])
            continue
        name, *own = line.split()
        groups[-1].append((Choice.parse(name), numbers(float)(own[0]) if own else thresholds))
    return groups


def _in_turn(groups: Sequence[Sequence[Setting]]) -> Iterator[tuple[Choice, float]]:
    """Of every group the first thresholds of all choices, then the second ones."""
    for group in groups:
        for place in range(max((len(thresholds) for _, thresholds in group), default=0)):
            for choice, thresholds in group:
                if place < len(thresholds):
                    yield choice, thresholds[place]


class Reading:
    """A text as the dense model reads it, and how well a choice reads it."""

    def __init__(self, model: Any, chooser: Chooser, ids: Tensor, judged: int) -> None:
        self.model, self.chooser, self.ids = model, chooser, ids
        last = ids.shape[1] - 1
        self.positions = torch.arange(last - judged, last, device=ids.device)
        self.targets = ids[0, self.positions + 1]
        self.dense = self.read()
        self.perplexity = compute_perplexity(self.dense, self.targets)

    @torch.inference_mode()
    def read(self) -> Tensor:
        """Log-probabilities [judged, V] of the tokens after ``positions``."""
        output = self.model(self.ids, use_cache=False, logits_to_keep=self.positions)
        return compute_log_probs(output.logits[0])

    def judge(self, choice: Choice, threshold: float) -> dict[str, Any]:
        """Density, KL and perplexity ratio, and what scoring cost in rows."""
        start = time.perf_counter()
        with self.chooser.set(choice, threshold):
            found = self.read()
            densities = [float(density) for density in self.chooser.densities]
            rows = self.chooser.rows
            heads = [float(share) for share in self.chooser.sorted_heads]
        kl = compute_kl(self.dense, found)
        return {
            "density": sum(densities) / len(densities),
            "kl": kl if math.isfinite(kl) else None,
            "dense_perplexity": self.perplexity,
            "perplexity_ratio": compute_perplexity(found, self.targets) / self.perplexity,
            "score_rows": sum(rows) / len(rows),
            "sorted_heads": sum(heads) / len(heads) if heads else None,
            "densities": [round(density, 4) for density in densities],
            "seconds": round(time.perf_counter() - start, 3),
        }


def encode(options: Any, text: Any, seed: int) -> Tensor:
    loaded = LoadedModel(
        model=None,
        tokenizer=load_gguf_tokenizer(options.weights),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return encode_excerpt(loaded, text, tokens=options.tokens, seed=seed)
