"""Times block-sparse attention against every dense kernel there is, on one GPU.

python -m bench.attention [--device cuda] [--shapes llama3-8b,...] [--lengths 8192,...]
    [--densities 0.1,...] [--selectors default,two,paper,forced] [--max-seconds N] [--output FILE]

Rows that matter most come first. `forced` are random blocks, attention alone; the others are
settings of UniSparse, with top_k for each density, and with their own rule for density null.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.passes.decision import device_name

from ..calls import (
    DEFAULT,
    SETTING_NAMES,
    SHAPES,
    Case,
    Lists,
    TopK,
    capture_smollm2,
    choose_top_k,
    create_selector,
    find_backends,
    force_density,
    relative_error,
    tail_error,
    takes,
)
from ..record import FOLDER, Record, guarded, numbers
from ..timing import LONG_MS, STATISTIC, graph_ms, kernel_ms, peak_bytes, plain_ms
from . import gate

FORCED = "forced"
SELECTORS = (*SETTING_NAMES, FORCED)
DEFAULT_SHAPES = tuple(name for name in SHAPES if name not in ("qwen3-8b", "gemma3-270m"))
LENGTHS = (131072, 32768, 8192, 16384, 65536, 4096)
FIRST_LENGTHS, FIRST_DENSITIES = 4, (0.1, 0.3)
DENSITIES = (0.1, 0.3, 0.05, 0.2, 0.5)
STAGES = ("pool", "score", "select")
MILLION = 1048576
CAPTURED, CAPTURED_TOKENS, CAPTURED_LAYERS = "smollm2", 8192, (3, 15, 27)
# A density that the guards alone exceed by so much is not measured under its name.
SLACK = 1.2

Plan = list[tuple[str, int, tuple[float | None, ...]]]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench.attention: no CUDA device here; --device cpu runs only the correctness gate"
        )
    name = device_name(options.device).replace(" ", "-")
    output = options.output or FOLDER / f"attention-{name}.json"
    backends = find_backends() if options.device == "cuda" else []
    record = Record.create(
        "bench.attention",
        options.device,
        output,
        options.max_seconds,
        gate={"passed": False},
        statistic=STATISTIC,
        selectors={name: repr(create_selector(name)) for name in SETTING_NAMES},
        backends=backends,
    )
    # One forward each: inputs need no gradients, and rows must not share compilations.
    with torch.no_grad(), record.stopping():
        run(options, record, backends)
    print(f"gate: {record.content['gate']}\nwritten to {output}", flush=True)
    if not record.content["gate"]["passed"]:
        raise SystemExit("bench.attention: the gate did not pass, see its rows")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--shapes", type=_names(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS)
    parser.add_argument("--densities", type=numbers(float), default=DENSITIES)
    parser.add_argument("--selectors", type=_names(SELECTORS), default=(DEFAULT, FORCED))
    parser.add_argument(
        "--compiled",
        type=numbers(float),
        default=FIRST_DENSITIES,
        help="densities at which unisparse_flex.attention is compiled and timed too (seconds each)",
    )
    parser.add_argument(
        "--million", action="store_true", help="adds 1048576 tokens of llama3-8b, only sparse"
    )
    parser.add_argument(
        "--from-model", action="store_true", help="adds queries and keys of SmolLM2's layers"
    )
    parser.add_argument("--max-seconds", type=float, default=500.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/attention-<device>.json")
    return parser.parse_args(arguments)


def _names(known: Sequence[str] | dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    def parse_names(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(known)}")
        return names

    return parse_names


def run(options: argparse.Namespace, record: Record, backends: list[str]) -> None:
    """Gates every shape before its first row, then times row by row."""
    length = min(gate.LENGTH, *options.lengths)
    selectors = [name for name in options.selectors if name != FORCED]
    gated: list[dict[str, Any]] = []
    allowed: dict[str, list[str]] = {}
    usable: dict[str, list[str]] = {}
    cases: dict[tuple[str, int], Case] = {}

    def check(shape: str) -> None:
        own = [name for name in backends if takes(name, SHAPES[shape])]
        rows = gate.check_shape(shape, length, options.device, selectors, own)
        for row in rows:
            gated.append(row)
            record.content["gate"] = gate.summarize(gated)
            record.add(row)
        wrong = [row for row in gated if row["shape"] == shape and not row["passed"]]
        parts = {row["selector" if row["backend"] == "whole" else "backend"] for row in wrong}
        allowed[shape] = [name for name in own if name not in parts]
        usable[shape] = [name for name in options.selectors if name not in parts]

    if options.device == "cpu":
        for shape in options.shapes:
            if record.stop_if_over():
                return
            check(shape)
        record.stop("timings need CUDA; only the gate ran")
        return
    steps = plan(options.shapes, options.lengths, options.densities)
    if options.million:
        # Behind the steps that matter most, lest the time limit always cuts it.
        steps.insert(min(FIRST_LENGTHS, len(steps)), ("llama3-8b", MILLION, (0.05, 0.1)))
    for place, (shape, tokens, densities) in enumerate(steps, start=1):
        if record.stop_if_over():
            return
        if shape not in allowed:
            check(shape)
        case = cases.setdefault((shape, tokens), Case(shape, tokens, options.device))
        try:
            for row in measure(case, densities, usable[shape], options.compiled, allowed[shape]):
                record.add(row)
                if record.stop_if_over():
                    return
        finally:
            case.close()
            torch.cuda.empty_cache()
        if options.from_model and place == min(FIRST_LENGTHS, len(steps)):
            if CAPTURED not in allowed:
                check(CAPTURED)
            measure_captured(record, usable[CAPTURED], allowed[CAPTURED], options.device)


def measure_captured(
    record: Record, selectors: Sequence[str], backends: list[str], device: str
) -> None:
    """Rows of some layers of SmolLM2 at a real prompt, under a shape name for each layer."""
    head: dict[str, Any] = {"stage": "capture", "shape": CAPTURED, "tokens": CAPTURED_TOKENS}
    shape = SHAPES[CAPTURED]
    found = guarded(
        head,
        "capture",
        lambda: capture_smollm2(CAPTURED_TOKENS, CAPTURED_LAYERS, shape.key, device),
    )
    if found is None:
        record.add(head)
        return
    for layer, inputs in found.items():
        case = Case(CAPTURED, CAPTURED_TOKENS, device, inputs[0].dtype)
        case.use(inputs)
        names = [name for name in selectors if name != FORCED]
        for row in measure(case, (None, *FIRST_DENSITIES), names, (), backends):
            record.add(row | {"shape": f"{CAPTURED}-layer-{layer}"})
        case.close()


def plan(shapes: Sequence[str], lengths: Sequence[int], densities: Sequence[float]) -> Plan:
    """Shape, length and densities of every step, the most important first; None is top_p."""
    first = [d for d in FIRST_DENSITIES if d in densities]
    rest = [d for d in densities if d not in first]
    rank = {length: place for place, length in enumerate(LENGTHS)}
    ordered = sorted(lengths, key=lambda length: rank.get(length, len(rank)))
    steps: Plan = []
    lead, others = shapes[:1], shapes[1:]
    for shape in lead:
        steps += [(shape, n, (*first, None)) for n in ordered[:FIRST_LENGTHS]]
        steps += [(shape, n, tuple(rest)) for n in ordered[:FIRST_LENGTHS] if rest]
        steps += [(shape, n, (*first, None, *rest)) for n in ordered[FIRST_LENGTHS:]]
    for shape in others:
        steps += [(shape, n, (*first, None)) for n in ordered]
    for shape in others:
        steps += [(shape, n, tuple(rest)) for n in ordered if rest]
    return steps


def measure(
    case: Case,
    densities: Sequence[float | None],
    selectors: Sequence[str],
    compiled: Sequence[float],
    backends: list[str],
) -> Iterator[dict[str, Any]]:
    """Rows of one step: dense once, then every density, selector and backend."""
    with_dense = case.tokens < MILLION
    if with_dense and "dense" not in case.found:
        yield measure_dense(case, backends)
    if with_dense:
        case.found["dense_output"] = guarded({}, "dense", case.dense_calls(())["sdpa"])
    for density in densities:
        for selector in selectors:
            if selector == FORCED and (density is None or not with_dense):
                continue
            yield from measure_sparse(case, density, selector, compiled, backends)


def _timed(row: dict[str, Any], name: str, function: Callable[[], Any]) -> float | None:
    """Times ``function`` both ways into ``name_ms`` (graph, if it works) and ``name_plain_ms``."""
    plain = guarded(row, f"{name}_plain", lambda: plain_ms(function))
    if plain is None:
        return None
    graph = None
    if plain < LONG_MS:
        graph = guarded(row, f"{name}_graph", lambda: graph_ms(function))
    row[f"{name}_plain_ms"] = plain
    row[f"{name}_ms"] = plain if graph is None else graph
    return row[f"{name}_ms"]


def measure_dense(case: Case, backends: list[str]) -> dict[str, Any]:
    """Times every dense kernel; what later rows need is kept in ``case``."""
    row: dict[str, Any] = {"stage": "dense", "shape": case.shape, "tokens": case.tokens}
    times: dict[str, float] = {}
    calls = guarded(row, "inputs", lambda: case.dense_calls(backends)) or {}
    for name, call in calls.items():
        timed: dict[str, Any] = {}
        ms = _timed(timed, "dense", call)
        if ms is not None:
            times[name] = ms
        for part, error in timed.get("errors", {}).items():
            row.setdefault("errors", {})[f"{name} {part}"] = error
    if "sdpa_cudnn" not in times:
        # Perhaps it takes no grouped heads: keys and values are repeated before the clock starts.
        call = guarded(row, "expanded", case.dense_expanded)
        ms = None if call is None else _timed({}, "dense", call)
        if ms is not None:
            times["sdpa_cudnn_expanded"] = ms
    row["dense_ms"] = times.get("sdpa")
    row["dense_kernel"] = min(times, key=lambda name: times[name]) if times else None
    row["dense_kernels"] = times
    if "sdpa" in times:
        row["peak_bytes"] = guarded(row, "memory", lambda: peak_bytes(calls["sdpa"]))
    case.found["dense"] = row
    return row


def measure_sparse(
    case: Case,
    density: float | None,
    selector: str,
    compiled: Sequence[float],
    backends: list[str],
) -> Iterator[dict[str, Any]]:
    """One row per backend: selection alone, attention alone, both, and the error they make."""
    dense = case.found.get("dense", {})
    row: dict[str, Any] = {
        "stage": "sparse",
        "shape": case.shape,
        "tokens": case.tokens,
        "density": density,
        "selector": selector,
        "dense_ms": dense.get("dense_ms"),
        "dense_kernel": dense.get("dense_kernel"),
        "dense_kernels": dense.get("dense_kernels", {}),
    }
    select: Callable[[], Lists] | None = None
    if selector == FORCED:
        lists = guarded(row, "lists", lambda: _forced_lists(case, density or 1.0))
    else:
        top = None if density is None else choose_top_k(case.geometry.num_q_blocks, density)
        if density is not None and top is not None and _is_beyond(top, density):
            least = f"top_k={top.count} keeps {top.density:.3f}"
            yield row | {"skipped": f"a density of {density:g} is out of reach: {least}"}
            return
        unisparse = create_selector(selector, None if top is None else top.count)
        row |= {"top_k": unisparse.top_k, "top_p": unisparse.top_p}
        if top is not None:
            row["density_expected"] = top.density

        def select() -> Lists:
            return case.select(unisparse)

        lists = guarded(row, "selection", select)
        if lists is not None:
            _timed(row, "selection", select)
            row["selection_stages_ms"] = guarded(row, "stages", lambda: _stages_ms(select))
    if lists is None:
        yield row
        return
    row["density_measured"] = case.density(lists)
    if density is not None and row["density_measured"] > SLACK * density:
        least = f"{row['density_measured']:.3f} is kept"
        yield row | {"skipped": f"a density of {density:g} is out of reach: {least}"}
        return
    for backend in backends:
        # A copy: errors of one backend are not the other's.
        own = row | {"backend": backend, "errors": dict(row.get("errors", {}))}
        _add_attention(own, case, lists, select, backend)
        users_call = backend == "triton" and select is not None and case.tokens < MILLION
        if users_call and density in compiled:
            call = guarded(own, "compiled", lambda: case.compile_whole(unisparse))
            if call is not None:
                _timed(own, "compiled", call)
        if not own["errors"]:
            del own["errors"]
        yield own


def _is_beyond(top: TopK, density: float) -> bool:
    return top.density > SLACK * density


def _forced_lists(case: Case, density: float) -> Lists:
    return force_density(case.heads.query, case.tokens, density, case.device).block_lists()


def _stages_ms(select: Callable[[], Lists]) -> dict[str, float]:
    found = kernel_ms(select)
    stages = {
        stage: sum(ms for name, ms in found.items() if name.startswith(f"_{stage}"))
        for stage in STAGES
    }
    return stages | {"other": sum(found.values()) - sum(stages.values())}


def _add_attention(
    row: dict[str, Any],
    case: Case,
    lists: Lists,
    select: Callable[[], Lists] | None,
    backend: str,
) -> None:
    def attend() -> Any:
        return case.attend(backend, lists)

    def both() -> Any:
        return attend() if select is None else case.attend(backend, select())

    exact = case.found.get("dense_output")
    if exact is not None:
        row["relative_error"] = guarded(row, "error", lambda: relative_error(attend(), exact))
    elif select is not None:
        row["tail_error"] = guarded(row, "error", lambda: tail_error(case, attend()))
    attention_ms = _timed(row, "attention", attend)
    if attention_ms is None:
        return
    total = attention_ms if select is None else _timed(row, "total", both)
    row["total_ms"] = total
    peak = guarded(row, "memory", lambda: peak_bytes(both))
    row["peak_bytes"] = peak
    dense_peak = case.found.get("dense", {}).get("peak_bytes")
    if peak is not None and dense_peak is not None:
        row["extra_memory_bytes"] = peak - dense_peak
    if total and row["dense_ms"]:
        row["speedup"] = row["dense_ms"] / total
        row["speedup_best"] = min(row["dense_kernels"].values()) / total
