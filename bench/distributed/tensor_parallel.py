"""Time to the first token of a model on one device and with its heads over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import unisparse_flex

from ..calls import at_density, create_selector
from ..prefill import create_model, prepare, release
from ..record import guarded
from .kept import kept_blocks
from .ranks import Rank

COLUMNS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("mlp.gate_proj", "mlp.up_proj"),
)
ROWS = ("self_attn.o_proj", "mlp.down_proj")
# Prompt of the comparison of kept blocks, which runs uncompiled.
COMPARED_TOKENS = 4096


def measure_model(rank: Rank, options: Any) -> Iterator[dict[str, Any]]:
    """Rows of one device (rank 0 alone) and of all, dense and sparse; the same on every rank."""
    model = create_model(options.layers, rank.device, small=options.small)
    generator = torch.Generator(rank.device).manual_seed(0)
    shape = (1, options.tokens)
    ids = torch.randint(model.config.vocab_size, shape, device=rank.device, generator=generator)
    found: dict[Any, Any] = {}
    for ranks in sorted({1, rank.count}):
        if ranks > 1:
            found["kept"] = keep_of_layers(model, ids, options)
            parallelize(model, rank)
        for variant in ("dense", "sparse"):
            yield _measure(model, ids, variant, ranks, rank, options, found)
    if rank.count > 1:
        yield _compare_blocks(model, ids, rank, options, found["kept"])


def parallelize(model: Any, rank: Rank) -> None:
    """Shards heads and feed-forward networks; attention sees plain tensors of fewer heads."""
    plan: dict[str, Any] = {}
    for name in COLUMNS:
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ROWS:
        plan[f"layers.*.{name}"] = RowwiseParallel()
    parallelize_module(model.model, rank.mesh, plan)
    if rank.device == "cuda":
        torch.cuda.empty_cache()


def _measure(
    model: Any,
    ids: Tensor,
    variant: str,
    ranks: int,
    rank: Rank,
    options: Any,
    found: dict[Any, Any],
) -> dict[str, Any]:
    row: dict[str, Any] = {"part": "tensor_parallel", "ranks": ranks, "variant": variant}
    row |= {"tokens": ids.shape[1], "layers": options.layers}
    selector = None
    if variant == "sparse":
        selector, top = at_density(options.selector, ids.shape[1], options.density)
        row |= {"density_expected": top.density, "top_k": top.count}
    torch._dynamo.reset()

    def time_it() -> None:
        # Ranks that have nothing to do would only warm the device that is timed.
        alone = ranks == 1 and rank.index > 0
        run = prepare(model, selector, "layers")

        def first_token() -> Tensor:
            logits: Tensor = run(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits.float()

        def once() -> None:
            if not alone:
                kept.append(first_token())

        kept: list[Tensor] = []
        row["first_call_seconds"] = round(rank.seconds(once), 2)
        rank.peak_bytes()
        row["ms"] = rank.seconds(once) * 1e3
        row["peak_bytes"] = rank.peak_bytes()
        if ranks > 1:
            row["logits_same_on_ranks"] = rank.is_same(kept[-1])
            row["bytes_received_per_rank"] = all_reduce_bytes(model, ids.numel(), ranks)
        if kept and (variant, 1) in found and ranks > 1:
            expected = found[variant, 1]["logits"]
            row["logits_relative_error"] = float((kept[-1] - expected).norm() / expected.norm())
        found[variant, ranks] = {"ms": row["ms"], "logits": kept[-1] if kept else None}
        _compare(row, variant, ranks, found)

    guarded(row, "prefill", time_it)
    guarded(row, "release", lambda: release(model))
    return row


def keep_of_layers(model: Any, ids: Tensor, options: Any) -> list[Tensor]:
    """What each layer keeps of a short prompt, by the selector's own rule: [1, H, Nq, Nk]."""
    unisparse_flex.optimize(model, create_selector(options.selector), min_length=0)
    with kept_blocks() as found:
        model(ids[:, :COMPARED_TOKENS], use_cache=False, logits_to_keep=1)
    unisparse_flex.restore(model)
    return found


def _compare_blocks(
    model: Any, ids: Tensor, rank: Rank, options: Any, alone: list[Tensor]
) -> dict[str, Any]:
    """Blocks of this rank's heads that one device chooses otherwise, over all layers."""
    row: dict[str, Any] = {"part": "tensor_parallel", "ranks": rank.count, "variant": "selection"}

    def compare() -> None:
        wrong = []
        for mine, whole in zip(keep_of_layers(model, ids, options), alone, strict=True):
            heads = mine.shape[1]
            part = whole[:, rank.index * heads : (rank.index + 1) * heads]
            wrong.append(rank.total(float((mine != part).sum())))
        row["tokens"] = min(ids.shape[1], COMPARED_TOKENS)
        row["compared_blocks_per_layer"] = alone[0].numel()
        row["differing_blocks_first_layer"], row["differing_blocks"] = (
            int(wrong[0]),
            int(sum(wrong)),
        )

    guarded(row, "selection", compare)
    return row


def all_reduce_bytes(model: Any, tokens: int, ranks: int) -> int:
    """Bytes that a rank receives in a prefill: two all-reduces of the hidden states a layer."""
    config = model.config
    hidden = tokens * config.hidden_size * next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * hidden * 2 * (ranks - 1) / ranks)


def _compare(row: dict[str, Any], variant: str, ranks: int, found: dict[Any, Any]) -> None:
    dense = found.get(("dense", ranks))
    if variant == "sparse" and dense:
        row["speedup"] = dense["ms"] / row["ms"]
    alone = found.get((variant, 1))
    if ranks > 1 and alone:
        row["scaling_efficiency"] = alone["ms"] / row["ms"] / ranks
