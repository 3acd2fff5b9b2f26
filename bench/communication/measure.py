"""What context parallel attention moves between ranks: measured needs, simulated scaling.

python -m bench.communication [--output FILE]      # needs of SmolLM2, then the study
python -m bench.tables --page docs/evidence/distributed-tables.md    # its tables

The study runs on no device. Bytes come from bench/communication/traffic.py, seconds of work from
the cost model with the rates of one H100, extrapolated from 131072 tokens at most; links are
nominal.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import UniSparse
from unisparse_flex.distributed import SequenceLayout
from unisparse_flex.evaluation import MODEL_NAME, CapturedAttention, TextName, load_smollm2
from unisparse_flex.passes.decision import RATES, CallShape, DeviceRates, cost_model, forecast_at
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .. import calls
from ..record import FOLDER, Record
from . import traffic
from .tables import describe

OUTPUT = FOLDER / "communication-simulated.json"
TEXTS: tuple[TextName, ...] = ("prose", "code")
MEASURED_TOKENS, MEASURED_RANKS = 8192, (2, 4, 8)
SELECTORS = {"paper": UniSparse.paper(), "default": DEFAULT_SELECTOR}
SETTINGS = {name: calls.create_selector(name) for name in calls.SETTINGS}

HEADS = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
RANKS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2**17, 2**20, 2**22, 2**24)
DENSITIES = (0.05, 0.1)
NEEDED = (1.0, 0.5)
# Bytes a second into one device: NVLink 4 within a node of eight, a 400 Gb/s link across nodes.
NODE, NODE_RATE, NETWORK_RATE = 8, 450e9, 50e9


def needed_share(kept: Tensor, layout: SequenceLayout) -> float:
    """Share of the others' blocks that some row of a rank keeps, mean over ranks and key heads.

    Args:
        kept: bool [Hkv, N, N].
        layout: Who holds which of the N blocks.
    """
    shares = []
    for rank in range(layout.ranks):
        spans = layout.blocks(rank)
        wanted = torch.stack([kept[:, slice(*span)].any(1) for span in spans]).any(0)
        others = torch.ones(kept.shape[-1], dtype=torch.bool)
        for span in spans:
            others[slice(*span)] = False
        shares.append(wanted[:, others].float().mean())
    return float(torch.stack(shares).mean())


def measure() -> Iterator[dict[str, Any]]:
    """Needs of a real model, one row for each text, selector and number of ranks."""
    loaded = load_smollm2()
    for text in TEXTS:
        captured = calls.capture_calls(loaded, text, MEASURED_TOKENS)
        tokens = captured[0].query.shape[2]
        for name, selector in SELECTORS.items():
            kept, densities = zip(*(_kept(selector, call) for call in captured), strict=True)
            for ranks in MEASURED_RANKS:
                layout = SequenceLayout(pieces=(tokens,), ranks=ranks)
                shares = [needed_share(each, layout) for each in kept]
                yield {
                    "text": text,
                    "selector": name,
                    "tokens": tokens,
                    "ranks": ranks,
                    "density": sum(densities) / len(shares),
                    "needed": sum(shares) / len(shares),
                    "needed_least_layer": min(shares),
                }


def _kept(selector: UniSparse, call: CapturedAttention) -> tuple[Tensor, float]:
    """Blocks that some head of a key head's group keeps, [Hkv, N, N], and the density."""
    selection = selector.select(call.query, call.key, is_causal=True)
    groups = selection.keep[0].unflatten(0, (call.key.shape[1], -1)).any(1)
    return groups.cpu(), selection.density()


def simulate() -> Iterator[dict[str, Any]]:
    """The study: one row for each length, number of ranks, density and share of needed blocks."""
    for name, selector in SETTINGS.items():
        for tokens in LENGTHS:
            for density in DENSITIES:
                work = predict(tokens, selector, density)
                for ranks in RANKS:
                    for needed in NEEDED if ranks > 1 else (0.0,):
                        yield {
                            "selector": name,
                            "tokens": tokens,
                            "ranks": ranks,
                            "density": density,
                            "needed": needed,
                            **simulate_one(tokens, selector, ranks, needed, work),
                        }


def simulate_one(
    tokens: int, selector: UniSparse, ranks: int, needed: float, work: dict[str, float]
) -> dict[str, Any]:
    """Bytes a rank receives and seconds of one attention layer."""
    composites = selector.keys_per_composite is not None
    moved = traffic.context_traffic(composites=composites)
    values = {
        traffic.R: ranks,
        traffic.needed: needed,
        cost_model.B: 1,
        cost_model.Hq: HEADS["q_heads"],
        cost_model.Hkv: HEADS["kv_heads"],
        cost_model.Sq: tokens,
        cost_model.Skv: tokens,
        cost_model.D: HEADS["head_dim"],
        cost_model.Dv: HEADS["value_dim"],
        cost_model.itemsize: 2,
        traffic.composite_itemsize: 2,
        cost_model.block: selector.block_size,
        cost_model.c_k: selector.c_k,
        cost_model.samples: selector.sampled_queries,
    }
    dense, sparse, selection, sampled = (
        float(expr.subs(values))
        for expr in (
            moved.dense_bytes,
            moved.sparse_bytes,
            moved.selection_bytes,
            moved.sampled_bytes,
        )
    )
    rate = NODE_RATE if ranks <= NODE else NETWORK_RATE
    # A ring passes keys on while it attends; the fetch comes before attention.
    dense_seconds = max(work["dense"] / ranks, dense / rate)
    sparse_seconds = work["sparse"] / ranks + sparse / rate
    return {
        "dense_bytes": dense,
        "sparse_bytes": sparse,
        "selection_bytes": selection,
        "sampled_rows_bytes": sampled if selector.sampled_queries else None,
        "dense_seconds": dense_seconds,
        "dense_link_seconds": dense / rate,
        "sparse_seconds": sparse_seconds,
        "sparse_link_seconds": sparse / rate,
        "speedup": dense_seconds / sparse_seconds,
        "dense_efficiency": work["dense"] / ranks / dense_seconds,
        "sparse_efficiency": work["sparse"] / ranks / sparse_seconds,
    }


def predict(tokens: int, selector: UniSparse, density: float) -> dict[str, float]:
    """Seconds of one device for the whole call."""
    shape = CallShape(
        batch=1,
        q_len=tokens,
        kv_len=tokens,
        is_causal=True,
        causal_lower_right=False,
        masked=False,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        plain=False,
        **HEADS,
    )
    found = forecast_at(shape, selector, rates(), density)
    return {"dense": found.dense_seconds, "sparse": found.sparse_seconds}


def rates() -> DeviceRates:
    """Those of an H200."""
    return next(r for r in RATES if (r.device, r.dtype) == ("cuda sm90", "bfloat16"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.communication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--keep-measured", action="store_true", help="takes the needs from the output as it is"
    )
    options = parser.parse_args(arguments)
    if options.keep_measured:
        measured = json.loads(options.output.read_text())["measured"]
    else:
        measured = list(measure())
    record = Record.create(
        "bench.communication",
        None,
        options.output,
        math.inf,
        simulated=True,
        model=MODEL_NAME,
        heads=HEADS,
        rates=rates().source,
        links={"node": NODE, "node_bytes_a_second": NODE_RATE, "network": NETWORK_RATE},
        measured=measured,
    )
    record.content["rows"] += simulate()
    record.write()
    print(describe(record.content, options.output.name))
