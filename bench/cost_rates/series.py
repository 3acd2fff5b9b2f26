"""Timings of the stages of attention on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import UniSparse, attention
from unisparse_flex.passes.attend import widen_tiles

from ..calls import (
    GATE_LENGTH,
    SELECTOR,
    Heads,
    attend,
    block_mask_of,
    check,
    create_inputs,
    dense,
    force_density,
    select,
    whole,
)
from ..record import guarded
from ..timing import host_seconds, measure, measure_in_graph

# Too short for the GPU to be waited for.
HOST_LENGTH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured on a device.

    Attributes:
        lengths: Tokens, for queries and keys alike.
        densities: Forced densities of the attention stage.
        heads: Head shapes; the whole call is timed only for the first.
        dtypes: Dtypes.
        tile: Keys that the dense kernel reads at a time.
        masked_lengths: Tokens of dense calls under a mask tensor.
        selectors: Whose selection is timed; whole calls are those of the first.
        least: Fewest repeats of a timing.
        budget: Seconds up to which a timing is repeated further.
    """

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    heads: tuple[Heads, ...]
    dtypes: tuple[torch.dtype, ...]
    tile: int
    least: int
    budget: float
    masked_lengths: tuple[int, ...] = ()
    selectors: tuple[UniSparse, ...] = (SELECTOR,)


@dataclass(frozen=True, kw_only=True)
class Series:
    """The timings of one head shape and dtype.

    A row that fails holds its errors instead of times.
    """

    plan: Plan
    heads: Heads
    dtype: torch.dtype
    device: str

    def stages(self) -> Iterator[dict[str, Any]]:
        """The gate, then dense, select and attend at every length and density."""
        torch._dynamo.reset()
        # As in every model that is made sparse: the kernel stands here without a marker.
        widen_tiles()
        run = torch.compile(attend, dynamic=True, fullgraph=True)
        selects = {
            selector: torch.compile(
                lambda q, k, selector=selector: select(q, k, selector),
                dynamic=True,
                fullgraph=True,
            )
            for selector in self.plan.selectors
        }
        gate = partial(check, self.heads, self.dtype, self.device, run)
        yield self._row("gate", GATE_LENGTH, lambda: {"relative_error": gate()})
        for length in self.plan.lengths:
            yield self._timed("dense", length, lambda q, k, v: dense(q, k, v))
            if length in self.plan.masked_lengths:
                yield self._timed("masked", length, partial(_dense_masked, self._mask(length)))
            for selector, choose in selects.items():
                cost = selector.cost
                composite = [cost.c_q, cost.c_k, cost.c_h, cost.sampled_queries]
                row = self._timed("select", length, lambda q, k, v, run=choose: run(q, k))
                yield row | {"composite": composite}
            for density in self.plan.densities:
                yield self._attend(run, length, density)

    def whole_calls(self) -> Iterator[dict[str, Any]]:
        """The call as a user makes it, at the density that comes of itself."""
        torch._dynamo.reset()
        run = torch.compile(whole, dynamic=True, fullgraph=True)
        for length in self.plan.lengths:
            row = self._timed("whole", length, lambda q, k, v: run(q, k, v))

            def natural(length: int = length) -> dict[str, Any]:
                query, key, _ = self._inputs(length)
                return {"density": SELECTOR.select(query, key, is_causal=True).density()}

            yield row | (guarded(row, "density", natural) or {})

    def host(self) -> Iterator[dict[str, Any]]:
        """What Python takes to launch a compiled call, dense and sparse."""
        torch._dynamo.reset()
        selector = self.plan.selectors[-1]

        def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, is_causal=True, enable_gqa=True, selector=selector)

        calls = {"dense": torch.compile(dense), "sparse": torch.compile(sparse)}
        inputs = self._inputs(HOST_LENGTH)

        def times() -> dict[str, Any]:
            with torch.no_grad():
                return {
                    f"{name}_seconds": host_seconds(partial(call, *inputs))
                    for name, call in calls.items()
                }

        yield self._row("host", HOST_LENGTH, times)

    def _mask(self, length: int) -> Tensor:
        row = torch.arange(length, device=self.device)
        return (row <= row[:, None])[None, None]

    def _inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        return create_inputs(self.heads, length, self.dtype, self.device)

    def _attend(self, run: Any, length: int, density: float) -> dict[str, Any]:
        def forced() -> dict[str, Any]:
            selection = force_density(self.heads.query, length, density, self.device)
            mask = block_mask_of(selection)
            row = self._timed("attend", length, lambda q, k, v: run(q, k, v, mask))
            return row | {"density": selection.density()}

        return self._row("attend", length, forced)

    def _timed(self, stage: str, length: int, function: Callable[..., Any]) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            inputs, plan = self._inputs(length), self.plan
            call = partial(function, *inputs)
            with torch.no_grad():
                if self.device == "cuda":
                    # What the GPU needs: Python launches the next call while it works.
                    times = measure_in_graph(call)
                else:
                    times = measure(call, self.device, least=plan.least, budget=plan.budget)
            p20, p50, p80 = (times[int(len(times) * part)] for part in (0.2, 0.5, 0.8))
            return {"p20": p20, "p50": p50, "p80": p80, "repeats": len(times)}

        return self._row(stage, length, run)

    def _row(
        self, stage: str, length: int, measure_it: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        heads = self.heads
        row: dict[str, Any] = {
            "stage": stage,
            "dtype": str(self.dtype).removeprefix("torch."),
            "q_heads": heads.query,
            "kv_heads": heads.key,
            "head_dim": heads.head_dim,
            "length": length,
        }
        return row | (guarded(row, stage, measure_it) or {})


def measure_all(plan: Plan, device: str) -> Iterator[dict[str, Any]]:
    """One row per stage, shape and density; whole calls, which nothing is fitted to, come last."""
    kinds = [(heads, dtype) for dtype in plan.dtypes for heads in plan.heads]
    series = [Series(plan=plan, heads=h, dtype=t, device=device) for h, t in kinds]
    first = [one for one in series if one.heads is plan.heads[0]]
    for one in first if device == "cuda" else ():
        yield from one.host()
    for one in series:
        yield from one.stages()
    for one in first:
        yield from one.whole_calls()


def _dense_masked(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
