"""Times attention on the queries and keys of real models at real prompts, layer by layer.

python -m bench.real_prompts [--models smollm2,llama3-8b,gemma3-270m] [--weights GEMMA.gguf]
    [--texts prose,code] [--qualities balanced] [--max-seconds N] [--output FILE]

Every causal layer of a model reads a prompt as long as the model's context. llama3-8b has no
weights here: its 8 key heads and 32 query heads, of 128 numbers each, are filled with heads of
SmolLM2 from all depths, padded with zeros, so that every logit and every density stays SmolLM2's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unisparse_flex
from unisparse_flex.block_masks.selectors import QUALITIES, selector_of_quality
from unisparse_flex.evaluation import LoadedModel
from unisparse_flex.passes.decision import device_name

from . import markdown
from .calls import (
    SHAPES,
    Case,
    Heads,
    capture_calls,
    find_backends,
    relative_error,
    takes,
    without_copies,
)
from .cost_decision import Attention, decide
from .markdown import milliseconds, percent
from .quality.models import load
from .record import FOLDER, Record, guarded
from .timing import STATISTIC, graph_ms

Inputs = tuple[Tensor, Tensor, Tensor]
Row = dict[str, Any]

FILLED = "llama3-8b"
# Which model's heads each shape reads, and how many tokens: the model's whole context.
SOURCES = {
    "smollm2": ("smollm2", 8192),
    FILLED: ("smollm2", 8192),
    "gemma3-270m": ("gemma3-270m", 32768),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.real_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(SOURCES))
    parser.add_argument("--weights", type=Path, help="a GGUF file of Gemma 3 270M")
    parser.add_argument("--texts", default="prose,code")
    parser.add_argument("--qualities", default="balanced")
    parser.add_argument("--max-seconds", type=float, default=300.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/real-prompts-<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.real_prompts: no CUDA device here")
    for given, known in ((options.models, SOURCES), (options.qualities, QUALITIES)):
        unknown = [name for name in given.split(",") if name not in known]
        if unknown:
            parser.error(f"{unknown} not among {', '.join(known)}")
    name = device_name("cuda").replace(" ", "-")
    record = Record.create(
        "bench.real_prompts",
        "cuda",
        options.output or FOLDER / f"real-prompts-{name}.json",
        options.max_seconds,
        weights="real",
        densities="free",
        qualities={name: repr(selector_of_quality(name)) for name in QUALITIES},
        statistic=f"{STATISTIC}; here all inside graphs",
    )
    with torch.no_grad(), record.stopping():
        record.collect(measure(options))
    print(f"written to {record.output}", flush=True)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of every model, text, quality and layer."""
    backends = find_backends()

    @cache
    def loaded(source: str) -> LoadedModel:
        return load(source, options.weights if source == "gemma3-270m" else None).loaded

    for shape in options.models.split(","):
        source, tokens = SOURCES[shape]
        case = Case(shape, tokens, "cuda")
        backend = next(name for name in reversed(backends) if takes(name, case.heads))
        for text in options.texts.split(","):
            layers = inputs_of(loaded(source), text, tokens, shape)
            head = {"model": shape, "heads_of": source, "text": text, "tokens": tokens}
            yield from measure_layers(case, layers, backend, head, options.qualities.split(","))


def inputs_of(loaded: LoadedModel, text: Any, tokens: int, shape: str) -> list[Inputs]:
    """Queries, keys and values of every causal layer, in the shape's heads.

    Queries are scaled so that one over the root of the shape's head_dim scales the logits.
    """
    heads = SHAPES[shape]
    own = loaded.model.config.num_key_value_heads
    calls = [without_copies(call, own) for call in capture_calls(loaded, text, tokens)]
    scaled: list[Inputs] = []
    for call in calls:
        scale = 1.0 if call.scale is None else call.scale * call.query.shape[3] ** 0.5
        factor = scale * (heads.head_dim / call.query.shape[3]) ** 0.5
        scaled.append((call.query if factor == 1 else call.query * factor, call.key, call.value))
    return fill(scaled, heads) if shape == FILLED else scaled


def fill(layers: Sequence[Inputs], heads: Heads) -> list[Inputs]:
    """The key heads of all layers, each with its query heads, dealt into calls of these heads.

    A call's key heads come from all depths. Where a key head has fewer query heads than are wanted,
    they are repeated; narrower heads get zeros behind. Key heads that fill no call are left out.

    Args:
        layers: Queries, keys and values, [1, H, S, D] each.
        heads: What each call has.
    """
    groups = []
    for query, key, value in layers:
        group = query.shape[1] // key.shape[1]
        taken = [place % group for place in range(heads.query // heads.key)]
        for head in range(key.shape[1]):
            queries = query[:, head * group : (head + 1) * group][:, taken]
            groups.append((queries, key[:, head : head + 1], value[:, head : head + 1]))
    calls = len(groups) // heads.key
    if not calls:
        raise ValueError(f"layers must have {heads.key} key heads in all, got {len(groups)}")
    found = []
    for call in range(calls):
        dealt = groups[call::calls][: heads.key]
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*dealt, strict=True))
        room = (0, heads.head_dim - query.shape[3])
        found.append((F.pad(query, room), F.pad(key, room), F.pad(value, room)))
    return found


def measure_layers(
    case: Case, layers: Iterable[Inputs], backend: str, head: Row, qualities: Sequence[str]
) -> Iterator[Row]:
    """Dense once, since its time does not depend on what it reads; then every layer."""
    dense: dict[str, float] = {}
    for number, inputs in enumerate(layers):
        case.use(inputs)
        for place, quality in enumerate(qualities):
            row: Row = head | {"layer": number, "backend": backend, "quality": quality}
            if not number and not place:
                dense = _dense_times(case, backend, row)
            row["dense_kernels"] = dense
            guarded(row, "sparse", partial(_measure_sparse, case, row))
            yield row


def _dense_times(case: Case, backend: str, row: Row) -> dict[str, float]:
    """Milliseconds of every dense kernel that takes these heads; why others do not, in ``row``."""
    calls = case.dense_calls(tuple(dict.fromkeys(("triton", backend))))
    found = {name: guarded(row, name, partial(graph_ms, call)) for name, call in calls.items()}
    return {name: ms for name, ms in found.items() if ms is not None}


def _measure_sparse(case: Case, row: Row) -> None:
    """Times of selection, attention and both, density, error, and what the library decides."""
    selector = selector_of_quality(row["quality"])
    lists = case.select(selector)
    row["density"] = case.density(lists)
    exact = case.dense_calls(())["sdpa"]()
    row["relative_error"] = relative_error(case.attend(row["backend"], lists), exact)
    run: dict[str, Callable[[], Any]] = {
        "selection_ms": lambda: case.select(selector),
        "attention_ms": lambda: case.attend(row["backend"], lists),
        "total_ms": lambda: case.attend(row["backend"], case.select(selector)),
    }
    row |= {name: graph_ms(function) for name, function in run.items()}
    row["speedup"] = min(row["dense_kernels"].values()) / row["total_ms"]
    if not row["layer"]:
        row["decision"] = decide(unisparse_flex.optimize(Attention(), selector), case.inputs)


def whole_models(result: Any) -> list[Row]:
    """Of each model, text and quality all layers as one: mean density, times summed.

    ``speedup`` is the sum of the fastest dense kernel's times over that of the sparse calls';
    ``decision`` what the library does with such calls by default, launched from Python.
    """
    found = []
    rows = [row for row in result["rows"] if "total_ms" in row]
    keys = ("model", "text", "tokens", "quality", "heads_of", "backend")
    rows.sort(key=lambda row: [list(SOURCES).index(row["model"]), *map(str, map(row.get, keys))])
    for _, group in groupby(rows, key=lambda row: [row[key] for key in keys]):
        of = list(group)
        dense = sum(min(row["dense_kernels"].values()) for row in of)
        found.append(
            {key: of[0][key] for key in keys}
            | {
                "layers": len(of),
                "decision": next(r["decision"]["decision"] for r in of if "decision" in r),
                "density": mean(row["density"] for row in of),
                "densities": (min(r["density"] for r in of), max(r["density"] for r in of)),
                "dense_ms": dense,
                "dense_kernel": min(of[0]["dense_kernels"], key=of[0]["dense_kernels"].get),
                "total_ms": sum(row["total_ms"] for row in of),
                "selection_ms": sum(row["selection_ms"] for row in of),
                "speedup": dense / sum(row["total_ms"] for row in of),
                "speedups": (min(r["speedup"] for r in of), max(r["speedup"] for r in of)),
                "flash_speedup": sum(r["dense_kernels"].get("sdpa_flash", float("nan")) for r in of)
                / sum(row["total_ms"] for row in of),
                "relative_error": mean(row["relative_error"] for row in of),
            }
        )
    return found


COLUMNS: dict[str, markdown.Format] = {
    **dict.fromkeys(("heads of", "text", "tokens", "quality", "calls", "by default"), "{}"),
    "density": percent,
    "least and most": "{0[0]:.0%}, {0[1]:.0%}",
    "dense ms": milliseconds,
    "by": "{}",
    "selection ms": milliseconds,
    "sparse ms": milliseconds,
    "speed-up": "{:.2f}x",
    "of calls": "{0[0]:.2f}x to {0[1]:.2f}x",
    "relative error": "{:.3f}",
}


def describe(result: Any, name: str) -> str:
    """The table of one file."""
    title = f"{name}: {result['device']}, torch {result['versions'].get('torch')}"
    names = (
        *("text", "tokens", "quality", "layers", "decision", "density", "densities"),
        *("dense_ms", "dense_kernel", "selection_ms", "total_ms", "speedup", "speedups"),
        "relative_error",
    )
    lines = [[_heads_of(row), *(row[key] for key in names)] for row in whole_models(result)]
    return markdown.page(*markdown.heading(title, result), markdown.table(COLUMNS, lines))


def _heads_of(row: Row) -> str:
    same = row["model"] == row["heads_of"]
    return row["model"] if same else f"{row['model']}, filled by {row['heads_of']}"


if __name__ == "__main__":
    main()
