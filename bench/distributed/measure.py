"""Attention over several devices, dense and sparse: tensor parallel and context parallel.

python -m bench.distributed [--ranks N] [--backend auto|nccl|gloo] [--tokens N] [--layers 32]
    [--density 0.1] [--context-tokens N] [--max-seconds N] [--output FILE] [--small]

The same code for any number of devices. Starts its own processes, which talk over the loopback of
this host. Every row is written when it is there. Without CUDA, --small is needed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.passes.decision import device_name

from ..calls import SETTINGS, create_selector
from ..prefill import SHAPE, SMALL
from ..record import FOLDER, Record, guarded
from .context_model import measure_context_model
from .context_parallel import measure_context
from .ranks import Rank, start_ranks
from .tensor_parallel import measure_model

PARTS = {
    "context_parallel": measure_context,
    "tensor_parallel": measure_model,
    "context_model": measure_context_model,
}
# For starting, and for the row that is under way when the time is up.
SPARE_SECONDS = 50.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--backend", choices=("auto", "nccl", "gloo"), default="auto")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--tokens", type=int, help="of the model's prompt")
    parser.add_argument("--layers", type=int, help="of the model: 32, or 2 with --small")
    parser.add_argument("--context-tokens", type=int, help="of a sequence that ranks share")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--selector", choices=tuple(SETTINGS), default="two")
    parser.add_argument("--max-seconds", type=float, default=230.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/distributed-<device>-x<N>.json")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU if need be")
    options = parser.parse_args(arguments)
    devices = torch.cuda.device_count()
    if not (devices or options.small):
        raise SystemExit("bench.distributed: no CUDA device here; --small tries it on the CPU")
    if options.backend == "auto":
        options.backend = "nccl" if devices else "gloo"
    if options.backend == "nccl" and options.ranks > devices:
        raise SystemExit(
            f"bench.distributed: --ranks must be at most the {devices} CUDA devices here, got "
            f"{options.ranks}"
        )
    options.tokens = options.tokens or (1024 if options.small else 131072)
    options.layers = options.layers or (2 if options.small else 32)
    options.context_tokens = options.context_tokens or (2048 if options.small else 2**20)
    if options.output is None:
        # No CUDA context in this process: the name comes from the first rank.
        options.output = FOLDER
    finished = start_ranks(
        options.ranks, options.backend, work, options, seconds=options.max_seconds + SPARE_SECONDS
    )
    if not finished:
        raise SystemExit("bench.distributed: ended early; the rows so far are written")


def work(rank: Rank, options: argparse.Namespace) -> None:
    """What each process does; the first one keeps the record."""
    output = options.output
    if output.is_dir():
        name = device_name(rank.device).replace(" ", "-")
        output = output / f"distributed-{name}-x{rank.count}.json"
    record = Record.create(
        "bench.distributed",
        rank.device,
        output,
        options.max_seconds,
        backend=options.backend,
        ranks=rank.count,
        model={"layers": options.layers, **(SMALL if options.small else SHAPE)},
        selector=repr(create_selector(options.selector)),
        statistic="one call after a first one (of one layer, where tokens of a model are over "
        "devices), the slowest rank; rows with ranks 1 ran on one device of the same host",
    )
    with torch.no_grad():
        for part in options.parts.split(","):
            rows = PARTS[part](rank, options)
            while not is_over(rank, record):
                failed: dict[str, Any] = {"part": part}
                row = guarded(failed, part, partial(next, rows, None))
                if row is None and "errors" not in failed:
                    break
                row = row or failed
                if rank.index == 0:
                    record.add(row)
    if rank.index == 0:
        record.write()
        print(f"written to {record.output}", flush=True)


def is_over(rank: Rank, record: Record) -> bool:
    """Whether the first rank's time is up; the same answer on every rank."""
    over = rank.largest(rank.index == 0 and record.is_over()) > 0
    if over and rank.index == 0 and "stopped" not in record.content:
        record.stop(f"after {record.limit:g} seconds")
    return over
