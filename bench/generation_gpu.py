"""What a generated token takes on a GPU with a cache that is read in part: random weights.

Called by `bench.generation`. ``generate`` compiles its decoding, as it does for every static cache.
Caches are filled with random keys and values; the prompt's last rows, which pin units, are computed
by the model. Densities are given. A token's time is that from the one before it to it, on the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import PROMPT_ROWS, DecodeSelector
from unisparse_flex.integrations.transformers import register
from unisparse_flex.integrations.transformers_names import cache_name

from . import prefill
from .record import guarded

# Sequences, and tokens of each.
SHAPES = ((1, 131072), (16, 32768), (4, 8192))
TOKENS, UNTIMED, LAYERS = 48, 8, 4
STATIC = "static"
SPARSE = DecodeSelector(share=0.1)
# Everything by the same kernels: what they gain without leaving anything out. At the first shape.
WHOLE = DecodeSelector(share=0.999)


def create_model(layers: int, device: str, *, small: bool) -> Any:
    """Of Llama-3.1-8B's shape with fewer layers."""
    register("unisparse")
    return prefill.create_model(layers, device, small=small, attention="sdpa")


def measure(
    model: Any, shapes: Sequence[tuple[int, int]], tokens: int = TOKENS
) -> Iterator[dict[str, Any]]:
    """A row for each shape and cache; the static one first."""
    for batch, length in shapes:
        more = (WHOLE,) if (batch, length) == shapes[0] else ()
        for selector in (None, SPARSE, *more):
            row: dict[str, Any] = {
                "batch": batch,
                "tokens": length,
                "cache": STATIC if selector is None else selector.text,
            }

            def run(
                batch: int = batch,
                length: int = length,
                selector: DecodeSelector | None = selector,
                row: dict[str, Any] = row,
            ) -> None:
                row.update(measure_cache(model, batch, length, selector, tokens))

            guarded(row, "generate", run)
            yield row


@torch.no_grad()
def measure_cache(
    model: Any, batch: int, length: int, selector: DecodeSelector | None, tokens: int
) -> dict[str, Any]:
    """Milliseconds of each token, and what was read of the cache."""
    torch._dynamo.reset()
    model.set_attn_implementation("sdpa" if selector is None else "unisparse")
    cache = create_cache(model.config, length + tokens, selector)
    fill(cache, model, batch, length - PROMPT_ROWS)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    clock = Clock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_name(): cache},
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    seconds = clock.times[0] - start, clock.times[UNTIMED] - clock.times[0]
    found = [1e3 * (after - before) for before, after in pairwise(clock.times[UNTIMED:])]
    return {
        "density": getattr(cache, "density", None),
        "first_seconds": round(seconds[0], 2),
        "compile_seconds": round(seconds[1], 2),
        "tokens_per_second": batch / median(found) * 1e3,
        "ms": sorted(found),
    }


class Clock:
    """A streamer that takes the time of every token.

    Attributes:
        times: Seconds, from the first token on.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """See transformers; the prompt comes first, and tokens are on the CPU."""
        if not self._is_prompt:
            self.times.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        """See transformers."""


def create_cache(config: Any, longest: int, selector: DecodeSelector | None) -> Any:
    """An empty cache."""
    from transformers import StaticCache

    from unisparse_flex.integrations.transformers_decode import SparseStaticCache

    if selector is None:
        return StaticCache(config, max_cache_len=longest)
    return SparseStaticCache(config, longest, selector)


def fill(cache: Any, model: Any, batch: int, count: int) -> None:
    """Writes random keys and values for so many tokens."""
    config = model.config
    shape = (batch, config.num_key_value_heads, count, model.model.layers[0].self_attn.head_dim)
    generator = torch.Generator(model.device).manual_seed(0)
    for index in range(config.num_hidden_layers):
        rows = torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device)
        cache.update(rows, rows, index)
