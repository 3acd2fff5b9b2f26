"""Time to the first token of a model whose ranks share the tokens, sparse and dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import unisparse_flex
from unisparse_flex import UniSparse
from unisparse_flex.distributed import ContextParallel

from ..calls import at_density, create_selector
from ..prefill import create_model, release
from ..record import guarded
from .ranks import Rank

# Prompt at which one device makes the whole call too, to compare; uncompiled.
COMPARED_TOKENS = 4096


def measure_context_model(rank: Rank, options: Any) -> Iterator[dict[str, Any]]:
    """A row of each variant over all ranks; the same on every rank. None for one rank."""
    if rank.count == 1:
        return
    model = create_model(options.layers, rank.device, small=options.small)
    context = ContextParallel(rank.mesh)
    generator = torch.Generator(rank.device).manual_seed(0)
    shape = (1, options.context_tokens)
    ids = torch.randint(model.config.vocab_size, shape, device=rank.device, generator=generator)
    tokens = options.context_tokens
    selector, top = at_density(options.selector, tokens, options.density)
    short = ids[:, :COMPARED_TOKENS]
    yield compare(model, short, context, create_selector(options.selector), rank)
    sparse_ms = None
    for variant in ("sparse", "dense"):
        row: dict[str, Any] = {"part": "context_model", "ranks": rank.count, "variant": variant}
        row |= {"tokens": tokens, "layers": options.layers}
        if variant == "sparse":
            row |= {"density_expected": top.density, "top_k": top.count}

        def time_it(row: dict[str, Any] = row, is_dense: bool = variant == "dense") -> None:
            _time(model, ids, context, selector, rank, row, is_dense=is_dense)

        guarded(row, "prefill", time_it)
        guarded(row, "release", lambda: release(model))
        if variant == "sparse":
            sparse_ms = row.get("ms")
        elif sparse_ms and "ms" in row:
            row["sparse_speedup_over_this"] = row["ms"] / sparse_ms
        yield row


def run_shared(model: Any, ids: Tensor, context: ContextParallel) -> Callable[[], Tensor]:
    """The model on this rank's tokens: [1, V] of its last one, on rank 0 the whole's last one."""
    own = context.shard(ids, 1)
    positions = context.shard(torch.arange(ids.shape[1], device=ids.device)[None], 1)

    def run() -> Tensor:
        output = model(own, position_ids=positions, use_cache=False, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    return run


def _time(
    model: Any,
    ids: Tensor,
    context: ContextParallel,
    selector: UniSparse,
    rank: Rank,
    row: dict[str, Any],
    *,
    is_dense: bool,
) -> None:
    # Of layers compiled one by one, all run the code of the first.
    torch._dynamo.reset()
    shortest = ids.shape[1] + 1 if is_dense else 0
    unisparse_flex.optimize(model.model.layers, selector, min_length=shortest, context=context)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    run = run_shared(model, ids, context)
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = 1
    try:
        row["first_layer_seconds"] = round(rank.seconds(run), 2)
    finally:
        model.config.num_hidden_layers = layers
    rank.peak_bytes()
    context.received.clear()
    row["ms"] = rank.seconds(run) * 1e3
    row["peak_bytes"] = rank.peak_bytes()
    received = context.received
    row["bytes_received_per_rank"] = int(rank.largest(sum(received.values())))


def compare(
    model: Any, ids: Tensor, context: ContextParallel, selector: UniSparse, rank: Rank
) -> dict[str, Any]:
    """The logits of a short prompt over the ranks against those of one device."""
    row: dict[str, Any] = {"part": "context_model", "ranks": rank.count, "variant": "logits"}
    row["tokens"] = ids.shape[1]

    def measure() -> None:
        for variant, shortest in (("sparse", 0), ("dense", ids.shape[1] + 1)):
            unisparse_flex.optimize(model, selector, min_length=shortest)
            alone = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            unisparse_flex.optimize(model, selector, min_length=shortest, context=context)
            shared = run_shared(model, ids, context)()
            # Rank 0 holds the last token.
            error = (shared - alone).norm() / alone.norm() if rank.index == 0 else 0.0
            row[f"{variant}_logits_relative_error"] = rank.largest(float(error))

    guarded(row, "logits", measure)
    unisparse_flex.restore(model)
    return row
