"""Sentences of pages whose numbers are those of files in bench/results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import torch

from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.passes.decision import RATES, CallShape, break_even_length_at
from unisparse_flex.selectors import DEFAULT_SELECTOR

from ..calls import SHAPES
from ..cost_decision import is_default, is_prompt
from ..record import FOLDER
from .front import QUALITY, load
from .front_tables import DECISIONS, OURS, TEXTS, density_ratios

HEADS = "llama3-8b"
CLAIMED = ("unisparse-paper", "xattention")
MODELS = {
    "SmolLM2": ("smollm2", (2048, 4096, 8192)),
    "Gemma 3": ("gemma3-270m", (2048, 8192, 32768)),
}


def decisions_sentence() -> str:
    """From which length on prompts run sparse, and the decisions that cost most."""
    result = load(DECISIONS)
    device = result["device"].removeprefix("NVIDIA ")
    known = [row for row in result["rows"] if not is_default(row)]
    bare = max(_sparse(known, model=False), key=_ratio)
    inside = max(_sparse(known, model=True), key=_ratio)
    one = max((row for row in result["rows"] if row["queries"] == 1 and row["layers"]), key=_ratio)
    default = _sparse(filter(is_default, result["rows"]), model=False)
    free = sorted(default, key=_ratio, reverse=True)
    worst, second, best = free[0], free[1], free[-1]
    return (
        f"- **From {break_even()} tokens on** prompts run sparse with these heads on an {device} "
        f"by default, from {break_even(masked=True)} under a mask that dense attention reads as a "
        "tensor. That is decided from the length and from the density that real prompts have, "
        "before the prompt is read.\n"
        "- **The cost model's worst decisions**, of calls launched from Python without "
        f"FlashAttention-4 on an {device}, random inputs. A bare call at default settings, which "
        f"keep {worst['density']:.0%} of such inputs at {worst['tokens']} tokens: "
        f"**{_ratio(worst):.2f} times** dense's time there, {_ratio(second):.2f} at "
        f"{second['tokens']} ({second['density']:.0%} kept), still {_ratio(best):.2f} at "
        f"{best['tokens']} ({best['density']:.0%}). Where the density is known (`top_k`), "
        f"{_ratio(bare):.2f} times for a bare call and {_ratio(inside):.2f} inside "
        f"{inside['layers']} layers of a model. Decoding stays dense there and takes up to "
        f"{_ratio(one):.2f} times as long.\n"
    )


def break_even(*, masked: bool = False) -> int:
    """From how many tokens on the cost model expects the default to be faster.

    Raises:
        ValueError: It never does.
    """
    heads = SHAPES[HEADS]
    [rates] = [each for each in RATES if (each.device, each.dtype) == ("cuda sm90", "bfloat16")]
    shape = CallShape(
        batch=1,
        q_heads=heads.query,
        kv_heads=heads.key,
        q_len=0,
        kv_len=0,
        head_dim=heads.head_dim,
        value_dim=heads.head_dim,
        is_causal=True,
        causal_lower_right=False,
        masked=masked,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    found = break_even_length_at(shape, DEFAULT_SELECTOR, rates, self_attention=True)
    if found is None:
        raise ValueError(f"no length at which the default is faster by the rates of {rates.source}")
    return found


def _sparse(rows: Iterable[dict[str, Any]], *, model: bool) -> list[dict[str, Any]]:
    """Prompts that were decided sparse, inside a model or as a bare call."""
    return [
        row
        for row in rows
        if is_prompt(row) and row["decision"] == "sparse" and bool(row["layers"]) is model
    ]


def _ratio(row: dict[str, Any]) -> float:
    return float(row["ratio"])


def equal_sentence() -> str:
    """What the default keeps over what other methods need for the same KL."""
    small, long = "quality-smollm2-8192", "quality-gemma3-270m-32768"
    eight = "quality-gemma3-270m-8192"
    first, second = ("flexprefill", "minference"), CLAIMED
    return (
        "- **At equal KL the default keeps fewer blocks than the other methods, on long code of "
        "Gemma 3 a few fewer**; over theirs, in the mean of excerpts: on SmolLM2 at 8192 tokens "
        f"{_span(small, second)} of what the paper's policy or XAttention needs and "
        f"{_span(small, first)} of FlexPrefill's or MInference's. Of the former two's on Gemma 3 "
        f"at 32768 tokens {_span(long, second, ['prose'])} on prose and "
        f"{_span(long, second, ['code'])} on code; at 8192 {_span(eight, second, ['prose'])} and "
        f"{_span(eight, second, ['code'])}. Excerpts differ: code on SmolLM2 "
        f"{_alone(small, 'code')} for one alone, on Gemma 3 at 32768 {_alone(long, 'code')}. "
        "SmolLM2 on [other excerpts](%(tables)s#other-excerpts): "
        f"{_span(f'{small}-unseen', second)}; with all positions of a text judged, the early ones "
        f"too: {_span(f'{small}-all', second)}.\n"
    ) % {"tables": "evidence/quality-tables.md"}


def rivals_sentence() -> str:
    """How many more blocks the paper's policy and XAttention need, by the columns of the dial."""
    ratios = [
        [r for rival in CLAIMED for r in density_ratios(load(name), rival, text)]
        for name in QUALITY
        for text in TEXTS
    ]
    *first, last = [[1 / ratio for ratio in column] for column in ratios]
    return (
        "For the same KL the paper's policy and XAttention need "
        f"{_ends(ratio for column in first for ratio in column)} times as many blocks in the "
        f"first three columns, {_ends(last)} times in the last "
        "([docs/quality.md](docs/quality.md)).\n"
    )


def _span(
    name: str, rivals: Sequence[str], texts: Sequence[str] = TEXTS, seed: int | None = None
) -> str:
    result = load(f"{name}.json")
    if seed is not None:
        result = result | {"rows": [row for row in result["rows"] if row.get("seed") == seed]}
    return _ends(
        r for text in texts for rival in rivals for r in density_ratios(result, rival, text)
    )


def _alone(name: str, text: str) -> str:
    """The least and the most of any excerpt."""
    seeds = {row["seed"] for row in load(f"{name}.json")["rows"] if row.get("text") == text}
    spans = [_span(name, CLAIMED, [text], seed).split(" to ") for seed in sorted(seeds)]
    return _ends(float(end) for span in spans for end in span)


def _ends(ratios: Iterable[float]) -> str:
    found = list(ratios)
    return f"{min(found):.2f} to {max(found):.2f}"


def lengths_sentence() -> str:
    """KL and perplexity of the default over lengths, in the mean and on single texts."""
    parts = []
    for model, (name, lengths) in MODELS.items():
        groups = [
            _defaults(f"quality-{name}-{length}.json", text) for length in lengths for text in TEXTS
        ]
        kls = [mean(row["kl"] for row in rows) for rows in groups]
        ratios = [mean(row["perplexity_ratio"] for row in rows) for rows in groups]
        single = [row for rows in groups for row in rows] + (_demos() if name == "smollm2" else [])
        among = ", the demo's among them" if name == "smollm2" else ""
        parts.append(
            f"{model} from {lengths[0]} to {lengths[-1]} tokens a KL of {min(kls):.3f} to "
            f"{max(kls):.3f} and a perplexity within {_within(ratios)} of dense's, in the mean of "
            f"excerpts (single texts{among}: up to {max(row['kl'] for row in single):.3f}, within "
            f"{_within(row['perplexity_ratio'] for row in single)})"
        )
    return f"- **One setting does for all lengths.** The default gives {'; '.join(parts)}.\n"


def _defaults(name: str, text: str) -> list[dict[str, Any]]:
    """The rows of the default at its own setting, one for each excerpt."""
    return [
        row
        for row in load(name)["rows"]
        if (row["selector"], row.get("text")) == (OURS, text)
        and decode_selector(row["parameters"]) == DEFAULT_SELECTOR
    ]


def _demos() -> list[dict[str, Any]]:
    """The sparse row of each file of the demo."""
    return [json.loads(path.read_text())["rows"][-1] for path in FOLDER.glob("demo-*.json")]


def _within(ratios: Iterable[float]) -> str:
    """The largest distance from 1, a tenth of a percent up."""
    return f"{math.ceil(1000 * max(abs(ratio - 1) for ratio in ratios)) / 10:.1f} %"
