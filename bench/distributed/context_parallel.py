"""One layer's attention over a sequence that ranks share, against one device, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.experimental import context_parallel

from unisparse_flex import attention
from unisparse_flex.distributed import ContextParallel, context_parallel_attention
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend import context_sdpa
from unisparse_flex.passes.calls import SdpaCall

from ..calls import (
    DENSE_KERNELS,
    SHAPES,
    Case,
    Heads,
    Lists,
    at_density,
    causal_lists,
    create_inputs,
    dense,
    find_backends,
    takes,
)
from ..record import describe, guarded
from .kept import kept_blocks
from .ranks import Rank

SMALL_HEADS = Heads(query=4, key=2, head_dim=32)
# At which every rank makes the whole call itself, to compare.
COMPARED_TOKENS = {"cuda": 32768, "cpu": 2048}

SHAPE = "llama3-8b"
FLASH = f"dense_{DENSE_KERNELS['flash']}"

Tensors = tuple[Tensor, Tensor, Tensor]


class Layer:
    """Queries, keys and values of one layer, and who computes what of them.

    Args:
        rank: This process.
        options: Of the command line.
        tokens: Queries and keys.
    """

    def __init__(self, rank: Rank, options: Any, tokens: int) -> None:
        self.rank, self.tokens = rank, tokens
        self.heads = SMALL_HEADS if options.small else SHAPES[SHAPE]
        dtype = torch.bfloat16 if rank.device == "cuda" else torch.float32
        self.whole: Tensors = create_inputs(self.heads, tokens, dtype, rank.device)
        self.context = ContextParallel(rank.mesh)
        query, key, value = (self.context.shard(tensor, 2) for tensor in self.whole)
        self.own: Tensors = query, key, value
        self.selector, self.top = at_density(options.selector, tokens, options.density)
        self.backend = "auto"

    def dense_alone(self) -> Tensor:
        return dense(*self.whole)

    def dense_flash_alone(self) -> Tensor:
        """FlashAttention-4 over all blocks, which dense attention over ranks runs too."""
        case, lists = self._every_block
        return case.attend("flash", lists)

    @cached_property
    def _every_block(self) -> tuple[Case, Lists]:
        case = Case(SHAPE, self.tokens, self.rank.device)
        case.use(self.whole)
        return case, causal_lists(case.geometry, self.rank.device)

    def sparse_alone(self) -> Tensor:
        query, key, value = self.whole
        return attention(query, key, value, is_causal=True, enable_gqa=True, selector=self.selector)

    def dense_gathered(self) -> Tensor:
        """Keys and values of all ranks gathered, then dense attention of the own rows."""
        query, key, value = self.own
        call = SdpaCall(query=query, key=key, value=value, is_causal=True, enable_gqa=True)
        config = SparseConfig(selector=self.selector, dense=True, context=self.context.name)
        return context_sdpa(call, config)

    def dense_ring(self) -> Tensor:
        """PyTorch's own context parallel; takes as many key heads as query heads."""
        group = self.heads.query // self.heads.key
        query, *others = (tensor.clone() for tensor in self.whole)
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in others)
        buffers = [query, key, value]
        with context_parallel(self.rank.mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            output: Tensor = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            return output

    def sparse_shared(self) -> Tensor:
        query, key, value = self.own
        return context_parallel_attention(
            query,
            key,
            value,
            context=self.context,
            selector=self.selector,
            is_causal=True,
            backend=self.backend,
        )


def measure_context(rank: Rank, options: Any) -> Iterator[dict[str, Any]]:
    """Rows of one device (rank 0 alone) and of all; the same on every rank."""
    yield compare(rank, options)
    layer = Layer(rank, options, options.context_tokens)
    found: dict[Any, float] = {}
    variants: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("sparse", 1, layer.sparse_alone),
        ("dense", 1, layer.dense_alone),
    ]
    if not options.small and "flash" in find_backends() and takes("flash", layer.heads):
        variants.append((FLASH, 1, layer.dense_flash_alone))
    if rank.count > 1:
        variants += [
            ("sparse", rank.count, layer.sparse_shared),
            ("dense", rank.count, layer.dense_gathered),
            ("dense_ring", rank.count, layer.dense_ring),
        ]
    for variant, ranks, function in variants:
        row = {"part": "context_parallel", "ranks": ranks, "variant": variant}
        row |= {"tokens": layer.tokens, "heads": f"{layer.heads.query}/{layer.heads.key}"}
        if variant == "sparse":
            row |= {"density_expected": layer.top.density, "top_k": layer.top.count}
        guarded(row, "attention", partial(_time, layer, row, function, found))
        yield row


def _time(
    layer: Layer, row: dict[str, Any], function: Callable[[], Tensor], found: dict[Any, float]
) -> None:
    rank, variant, ranks = layer.rank, row["variant"], row["ranks"]

    def once() -> None:
        if ranks > 1 or rank.index == 0:
            function()

    # Compiled calls need a first one; other dense ones of a million tokens take many seconds.
    if variant in ("sparse", FLASH) or (variant == "dense" and ranks > 1):
        row["first_call_seconds"] = round(_first_call(layer, row, once), 2)
        row["backend"] = layer.backend
    rank.peak_bytes()
    layer.context.received.clear()
    row["ms"] = rank.seconds(once) * 1e3
    row["peak_bytes"] = rank.peak_bytes()
    found[variant, ranks] = row["ms"]
    if ranks > 1 and layer.context.received:
        received = layer.context.received
        row["bytes_received"] = {k: int(rank.largest(received[k])) for k in sorted(received)}
        row["bytes_received_per_rank"] = int(rank.largest(sum(received.values())))
    if variant != "sparse" and ("sparse", ranks) in found:
        row["sparse_speedup_over_this"] = row["ms"] / found["sparse", ranks]
        row["best_dense_ms"] = _fastest(found, variant, ranks)
    alone = _fastest(found, variant, 1)
    if ranks > 1 and alone:
        row["scaling_efficiency"] = alone / row["ms"] / ranks


def _fastest(found: dict[Any, float], variant: str, ranks: int) -> float | None:
    """Milliseconds of the sparse call on so many ranks, or of the fastest dense kernel there."""
    sparse = variant == "sparse"
    times = [ms for (name, n), ms in found.items() if n == ranks and (name == "sparse") == sparse]
    return min(times, default=None)


def _first_call(layer: Layer, row: dict[str, Any], once: Callable[[], None]) -> float:
    """Seconds of the call that compiles; by Triton where the kernel of "auto" does not run."""
    try:
        return layer.rank.seconds(once)
    except RuntimeError as error:
        if layer.backend != "auto" or row["ranks"] == 1:
            raise
        row["auto_error"] = describe(error)
        layer.backend = "triton"
    return layer.rank.seconds(once)


def compare(rank: Rank, options: Any) -> dict[str, Any]:
    """Blocks and output of the own rows against those of the whole call on one device."""
    row: dict[str, Any] = {"part": "context_parallel", "ranks": rank.count, "variant": "selection"}

    def run() -> None:
        tokens = min(options.context_tokens, COMPARED_TOKENS[rank.device])
        layer = Layer(rank, options, tokens)
        query, key, _ = layer.whole
        selection = layer.selector.select(query, key, is_causal=True)
        with kept_blocks() as found:
            output = layer.sparse_shared()
        layout = layer.context.layout(tokens)
        own = layout.blocks(rank.index)
        keep = torch.cat([selection.keep[:, :, slice(*span)] for span in own], 2)
        wrong = rank.total(float((torch.cat(found, 2) != keep).sum()))
        expected = layer.context.shard(layer.sparse_alone(), 2)
        error = (output.float() - expected.float()).norm() / expected.float().norm()
        row["tokens"] = tokens
        row["compared_blocks"], row["differing_blocks"] = selection.keep.numel(), int(wrong)
        row["output_relative_error"] = rank.largest(float(error))
        row["density"] = selection.density()

    guarded(row, "selection", run)
    return row
