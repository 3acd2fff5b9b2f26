"""Timings of the stages of attention on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from ..timing import measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured on a device.

    Attributes:
        lengths: Tokens, for queries and keys alike.
        densities: Forced densities of the attention stage.
        heads: Head shapes; the whole call is timed only for the first.
        dtypes: Dtypes.
        tile: Keys that the dense kernel reads at a time.
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
        run: dict[Any, Any] = {
            run: torch.compile(run, dynamic=True, fullgraph=True) for run in (attend, select)
        }
        gate = partial(check, self.heads, self.dtype, self.device, run[attend])
        yield self._row("gate", GATE_LENGTH, lambda: {"relative_error": gate()})
        for length in self.plan.lengths:
            yield self._timed("dense", length, lambda q, k, v: dense(q, k, v))
            yield self._timed("select", length, lambda q, k, v: run[select](q, k))
            for density in self.plan.densities:
                yield self._attend(run[attend], length, density)

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
            with torch.no_grad():
                times = measure(
                    lambda: function(*inputs), self.device, least=plan.least, budget=plan.budget
                )
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
    for one in series:
        yield from one.stages()
    for one in series:
        if one.heads is plan.heads[0]:
            yield from one.whole_calls()
