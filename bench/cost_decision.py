"""Times what the cost model decides: an optimized call against the same call left alone.

python -m bench.cost_decision [--lengths 1024,...] [--top-k 16,...] [--layers 0,2]
    [--max-seconds N] [--output FILE]

Both are compiled for dynamic lengths and launched from Python, in turns: the optimized one should
not be slower, whichever way it runs. Decoding (one query) is measured as well. What runs is a bare
attention call (`--layers 0`: every microsecond of the call shows) or so many layers of a decoder.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisparse_flex
from unisparse_flex import UniSparse
from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.passes.decision import device_name
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import markdown
from .calls import SHAPES, Heads, create_inputs
from .markdown import milliseconds, percent
from .record import FOLDER, Record, guarded, numbers
from .timing import in_turn, time_cuda

LENGTHS = (1024, 2048, 4096, 8192, 9216, 10240, 12288, 16384, 32768, 65536)
TOP_K = (16, 64, 256)
LAYERS = (0, 2)
# Width of the feed-forward part over that of the model.
EXPANSION = 3.5
# Seconds that the turns of one pair may take together, and how many there are.
BUDGET, LEAST, MOST = 0.5, 5, 200
BATCH = 4


class Attention(nn.Module):
    """One call with grouped heads, causal but for a single query."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[2] == 1:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    """The layer of a decoder, without positions; keys and values are given where it decodes."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        width, inner = heads.query * heads.head_dim, heads.key * heads.head_dim
        hidden = int(EXPANSION * width)
        self.head_dim = heads.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.attention = Attention()

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        normed = self.norms[0](x)
        query, key, value = (
            project(normed).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(cache, (key, value), strict=True))
        x = x + self.out(self.attention(query, key, value).transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """A stack of layers."""

    def __init__(self, heads: Heads, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(heads) for _ in range(layers))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost_decision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama3-8b")
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS)
    parser.add_argument("--top-k", type=numbers(int), default=TOP_K)
    parser.add_argument("--layers", type=numbers(int), default=LAYERS)
    parser.add_argument("--max-seconds", type=float, default=300.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/cost-decision-<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.cost_decision: no CUDA device here")
    name = device_name("cuda").replace(" ", "-")
    record = Record.create(
        "bench.cost_decision",
        "cuda",
        options.output or FOLDER / f"cost-decision-{name}.json",
        options.max_seconds,
        statistic=f"median over turns of {BATCH} calls each, launched from Python, between CUDA "
        "events; ratio: median over turns of optimized over dense",
    )
    with torch.no_grad(), record.stopping():
        record.collect(measure(options))
    print(f"written to {record.output}", flush=True)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per model, selector, length and number of queries."""
    heads = SHAPES[options.shape]
    for layers in options.layers:
        for selector in (*(UniSparse(top_k=count) for count in options.top_k), DEFAULT_SELECTOR):
            torch._dynamo.reset()
            pair = Pair(heads, layers, selector)
            for length in options.lengths:
                for q_len in (length, 1):
                    row = {"shape": options.shape, "layers": layers, "tokens": length}
                    row |= {"queries": q_len, "selector": repr(selector)}
                    yield row | pair.measure(create(heads, layers, length, q_len))


def create(heads: Heads, layers: int, length: int, q_len: int) -> tuple[Any, ...]:
    """The inputs of `Attention`, or those of `Decoder`."""
    query, key, value = create_inputs(heads, length, torch.bfloat16, "cuda")
    if not layers:
        return query[:, :, -q_len:], key, value
    x = query[:, :, -q_len:].transpose(1, 2).flatten(2)
    return (x,) if q_len > 1 else (x, (key[:, :, 1:], value[:, :, 1:]))


class Pair:
    """A model left alone and one optimized, both compiled."""

    def __init__(self, heads: Heads, layers: int, selector: UniSparse) -> None:
        def build() -> nn.Module:
            torch.manual_seed(0)
            model = Decoder(heads, layers) if layers else Attention()
            return model.to("cuda", torch.bfloat16)

        with torch.device("cuda"):
            plain, self.optimized = build(), build()
        unisparse_flex.optimize(self.optimized, selector)
        self.plain = torch.compile(plain, dynamic=True)
        self.run = torch.compile(self.optimized, dynamic=True)

    def measure(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        """How the call is decided, and the times of both."""
        row: dict[str, Any] = {}
        guarded(row, "decision", lambda: row.update(decide(self.optimized, inputs)))
        guarded(row, "times", lambda: row.update(compare(self.plain, self.run, inputs)))
        return row


def decide(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The decision on an optimized model's calls, its reason, and their mean density."""
    found = unisparse_flex.explain(model, *inputs)
    [(decision, reason)] = {(call.decision, call.reason) for call in found.calls}
    return {"decision": decision, "reason": reason, "density": found.density}


def compare(
    plain: Callable[..., Tensor], optimized: Callable[..., Tensor], inputs: tuple[Any, ...]
) -> dict[str, Any]:
    """Milliseconds of a call of each, and their ratio, from turns of one and the other."""

    def turn(run: Callable[..., Tensor]) -> float:
        def calls() -> None:
            for _ in range(BATCH):
                run(*inputs)

        return time_cuda(calls) / BATCH * 1e3

    for run in (plain, optimized):
        for _ in range(3):
            run(*inputs)
    once = turn(plain) + turn(optimized)
    turns = max(LEAST, min(MOST, int(BUDGET * 1e3 / (BATCH * once))))
    dense, sparse = in_turn([partial(turn, plain), partial(turn, optimized)], repeats=turns)
    return {
        "dense_ms": median(dense),
        "optimized_ms": median(sparse),
        "ratio": median(ms / dense_ms for dense_ms, ms in zip(dense, sparse, strict=True)),
        "turns": turns,
    }


COLUMNS: dict[str, markdown.Format] = {
    "layers": "{}",
    "tokens": "{}",
    "queries": "{}",
    "rule": "{}",
    "decision": "{}",
    "density": percent,
    "left alone ms": milliseconds,
    "optimized ms": milliseconds,
    "ratio": "{:.2f}",
}


def describe(result: dict[str, Any], name: str) -> str:
    """The table of one file."""
    title = f"{name}: {result['device']}, torch {result['versions'].get('torch')}"
    return markdown.page(*markdown.heading(title, result), decision_table(result))


def decision_table(result: dict[str, Any]) -> str:
    """How the cost model decides each call, and its time over that of the call left alone."""
    names = ("decision", "density", "dense_ms", "optimized_ms", "ratio")
    return markdown.table(
        COLUMNS,
        [
            [row["layers"] or "bare call", row["tokens"], row["queries"], _rule(row["selector"])]
            + [row.get(name) for name in names]
            for row in result["rows"]
        ],
    )


def is_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a whole prompt, not of decoding, and was measured."""
    return bool(row["queries"] == row["tokens"] and "ratio" in row and "decision" in row)


def is_default(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the default selector."""
    return decode_selector(row["selector"]) == DEFAULT_SELECTOR


def _rule(selector: str) -> str:
    """The rule in a selector's text."""
    return ", ".join(re.findall(r"(?:top_p|top_k|threshold)=[\d.]+", selector))


if __name__ == "__main__":
    main()
