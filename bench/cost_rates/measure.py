"""Times the stages of attention on this device and fits the rates of the cost model.

python -m bench.cost_rates [--device cuda] [--plain-selection] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.block_masks import kernels
from unisparse_flex.evaluation import describe_device
from unisparse_flex.passes.decision import PLAIN, device_name, facts_of
from unisparse_flex.selectors import DEFAULT_SELECTOR

from ..calls import SELECTOR, Heads
from ..record import FOLDER, Record
from ..timing import measure
from . import fit as rate_fit
from .series import Plan, measure_all

PLANS = {
    "cpu": Plan(
        lengths=(256, 512, 1024, 2048, 4096, 8192),
        densities=(0.15, 0.5),
        heads=(Heads(query=9, key=3, head_dim=64), Heads(query=4, key=1, head_dim=128)),
        dtypes=(torch.float32, torch.bfloat16),
        tile=512,
        least=2,
        budget=1.0,
        selectors=(DEFAULT_SELECTOR,),
    ),
    "cuda": Plan(
        lengths=(2048, 4096, 8192, 16384, 32768, 65536, 131072),
        densities=(0.05, 0.15, 0.3, 0.7),
        heads=(Heads(query=32, key=8, head_dim=128), Heads(query=9, key=3, head_dim=64)),
        dtypes=(torch.bfloat16,),
        tile=128,
        least=5,
        budget=0.1,
        masked_lengths=(2048, 4096, 8192, 16384, 32768, 65536),
        selectors=(SELECTOR, DEFAULT_SELECTOR),
    ),
}
# Of a call of 8192 tokens.
SORTED, SORTED_BLOCKS = PLANS["cpu"].heads[0], 64
MAX_SECONDS = {"cpu": 900.0, "cuda": 220.0}
FORMS = ("sum", "max")
SHIPPED = Path("passes/decision/rates")


def main(arguments: list[str] | None = None) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.cost_rates", description=__doc__)
    parser.add_argument("--device", choices=tuple(PLANS), default=default)
    parser.add_argument("--output", type=Path, help="bench/results/rates-<device>.json by default")
    parser.add_argument(
        "--shipped", type=Path, help="what the library reads; passes/decision/rates/<device>.json"
    )
    parser.add_argument("--max-seconds", type=float, help="stops measuring: cpu 900, cuda 220")
    parser.add_argument(
        "--plain-selection", action="store_true", help="score and select without the GPU kernels"
    )
    options = parser.parse_args(arguments)

    if options.device == "cpu":
        # Rates are those of one thread: cores that others use cannot stall it.
        torch.set_num_threads(1)
    limit = options.max_seconds or MAX_SECONDS[options.device]
    plan, name = PLANS[options.device], device_name(options.device)
    if options.plain_selection:
        name += PLAIN
        kernels.obstacle = lambda *_: "asked for"
    output = options.output or FOLDER / f"rates-{name.replace(' ', '-')}.json"
    record = Record.create(
        "bench.cost_rates",
        options.device,
        output,
        limit,
        device=name,
        hardware=describe_device(torch.device(options.device)),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        selectors=[repr(selector) for selector in plan.selectors],
        statistic="p20 of the repeats; inside a CUDA graph, or CPU seconds of the process; "
        "host: least of four turns",
    )
    common = {"tile": plan.tile, "plain": options.plain_selection or options.device == "cpu"}
    with record.stopping():
        record.collect(row | common for row in measure_all(plan, options.device))
    result = record.content
    result["peak_bandwidth"] = peak_bandwidth(options.device)
    result["sort_rate"] = sort_rate() if options.device == "cpu" else None
    result["rates"], result["errors"] = fit_all(
        result["rows"], result["peak_bandwidth"], result["sort_rate"]
    )
    record.write()
    print(json.dumps(result["errors"], indent=1))
    shipped = options.shipped or SHIPPED / output.name.removeprefix("rates-")
    shipped.write_text(shipped_rates(result, output))
    print(f"written to {output} and {shipped}")


def shipped_rates(result: Mapping[str, Any], source: Path) -> str:
    """What the library reads of a result."""
    names = ("device", "hardware", "versions", "rates")
    content = {"source": f"{FOLDER}/{source.name}", **{name: result[name] for name in names}}
    return json.dumps(content, indent=1) + "\n"


def peak_bandwidth(device: str) -> float | None:
    """Bytes a second between a GPU and its memory, as it reports them; ``None`` of a CPU."""
    facts = facts_of(torch.cuda.current_device()) if device == "cuda" else None
    return None if facts is None else facts.bandwidth


def sort_rate() -> float:
    """Comparisons a second of a CPU that sorts block scores.

    Measured by itself: where one selector's selection alone was timed, a fit cannot tell what its
    sorts take from what its logits do.
    """
    scores = torch.rand(1, SORTED.query, SORTED_BLOCKS, SORTED_BLOCKS)
    times = measure(lambda: scores.sort(-1, descending=True), "cpu", least=5, budget=1.0)
    return scores.numel() * math.log2(SORTED_BLOCKS) / times[len(times) // 5]


def fit_all(
    rows: list[dict[str, Any]],
    peak_bandwidth: float | None = None,
    sort_rate: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates and prediction errors of every dtype whose gate passed."""
    bounds = {} if peak_bandwidth is None else {"bandwidth": peak_bandwidth}
    known = {} if sort_rate is None else {"sort_rate": sort_rate}
    rates: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        red = [row["errors"] for row in own if row["stage"] == "gate" and "errors" in row]
        fitted = [row for row in own if row["stage"] in rate_fit.FITTED and "p20" in row]
        whole = [row for row in own if row["stage"] == "whole" and {"p20", "density"} <= row.keys()]
        if red or not set(rate_fit.NEEDED) <= {row["stage"] for row in fitted}:
            errors[dtype] = {"not_fitted": red or "a stage was not measured"}
            continue
        table = rate_fit.to_rows(fitted)
        shapes = [(row["q_heads"], row["head_dim"], row["length"]) for row in fitted]
        costs = rate_fit.fit(table, bounds=bounds, known=known)
        rates[dtype] = {"tile": own[0]["tile"], **rate_fit.to_rates(costs, table)}
        for row in own:
            if row["stage"] == "host" and "sparse_seconds" in row:
                for kind in ("dense", "sparse"):
                    seconds = float(f"{row[f'{kind}_seconds']:.{rate_fit.DIGITS}g}")
                    rates[dtype][f"{kind}_host_seconds"] = seconds
        errors[dtype] = {
            "fit": rate_fit.summarize(rate_fit.errors(table, costs)),
            **_errors_by_stage(fitted, rate_fit.errors(table, costs)),
            "held_out_shapes": {
                form: rate_fit.summarize(
                    rate_fit.held_out_errors(table, shapes, form, bounds, known)
                )
                for form in FORMS
            },
        }
        if whole:
            error = rate_fit.errors(rate_fit.to_rows(whole), costs)
            errors[dtype]["whole_call_not_fitted"] = rate_fit.summarize(error)
    return rates, errors


def _errors_by_stage(rows: list[dict[str, Any]], error: torch.Tensor) -> dict[str, Any]:
    return {
        stage: rate_fit.summarize(error[[i for i, r in enumerate(rows) if r["stage"] == stage]])
        for stage in rate_fit.FITTED
        if any(row["stage"] == stage for row in rows)
    }
