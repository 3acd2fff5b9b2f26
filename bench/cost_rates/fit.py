"""Least squares on log error: rates of the cost model from timed stages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from unisparse_flex.passes.decision import RATE_NAMES as RATES
from unisparse_flex.passes.decision import cost_model as cm
from unisparse_flex.passes.decision import is_speed

from ..calls import SELECTOR

NEEDED = ("dense", "select", "attend")
FITTED = (*NEEDED, "masked")
IS_SECONDS = tuple(not is_speed(name) for name in RATES)
DIGITS, LEAST_SHAPES = 4, 4


@dataclass(frozen=True, eq=False)
class Rows:
    """Timed rows as tensors: work [R, rates] and seconds [R]."""

    work: Tensor
    seconds: Tensor

    def pick(self, index: Sequence[int]) -> Rows:
        return Rows(self.work[list(index)], self.seconds[list(index)])


def to_rows(rows: Sequence[dict[str, Any]]) -> Rows:
    """Work of every rate in every row, from the cost model's own expressions."""
    work = torch.stack([_work(row) for row in rows])
    return Rows(work, torch.tensor([row["p20"] for row in rows], dtype=torch.float64))


def _work(row: dict[str, Any]) -> Tensor:
    stages = cm.attention_stages(causal=True)
    names = ("select", "attend") if row["stage"] == "whole" else (row["stage"],)
    total = torch.zeros(len(RATES), dtype=torch.float64)
    for name in names:
        stage = stages[name]
        for rate, expression in {**stage.constants, **stage.divided}.items():
            total[RATES.index(rate)] += float(expression.subs(_shape(row)))
    return total


def _shape(row: dict[str, Any]) -> dict[sympy.Symbol, float]:
    length, cost = row["length"], SELECTOR.cost
    own = (cost.c_q, cost.c_k, cost.c_h, cost.sampled_queries)
    itemsize = getattr(torch, row["dtype"]).itemsize
    sizes = (1, row["q_heads"], row["kv_heads"], length, length, row["head_dim"], row["head_dim"])
    composite = row.get("composite", own)
    flags = int(row["stage"] == "masked"), int(row.get("plain", True))
    shape = (*sizes, 0, *flags, itemsize)
    settings = (SELECTOR.block_size, *composite, row.get("density", 1.0), row["tile"])
    return dict(zip((*cm.SHAPE, *cm.SETTINGS), (*shape, *settings), strict=True))


def predict(work: Tensor, costs: Tensor, form: str) -> Tensor:
    """Seconds from work and seconds per unit of work.

    ``"sum"`` adds all terms, ``"max"`` takes the largest of those that scale with work.
    """
    paid = work * costs
    if form == "sum":
        return paid.sum(-1)
    seconds = torch.tensor(IS_SECONDS)
    return (paid * seconds).sum(-1) + (paid * ~seconds).amax(-1)


def fit(
    rows: Rows,
    form: str = "sum",
    bounds: Mapping[str, float] | None = None,
    known: Mapping[str, float] | None = None,
) -> Tensor:
    """Seconds per unit of work of each rate, positive, by least squares on the log error.

    Args:
        rows: What was timed.
        form: See `predict`.
        bounds: The most that a rate can be, by name.
        known: Rates that were measured by themselves, by name.
    """
    used = rows.work > 0
    rough = (rows.seconds[:, None] / rows.work.clamp_min(1e-30)).masked_fill(~used, math.inf)
    start = (rough.amin(0) / 2).where(used.any(0), torch.ones(len(RATES), dtype=torch.float64))
    low, high = start.log() - 25, torch.full_like(start, math.inf)
    for name, most in (bounds or {}).items():
        low[RATES.index(name)] = -math.log(most)
    for name, rate in (known or {}).items():
        low[RATES.index(name)] = high[RATES.index(name)] = -math.log(rate)
    logs = torch.maximum(start.log(), low).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=2000, history_size=30, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        predicted = predict(rows.work, logs.clamp(low, high).exp(), form)
        value = (predicted.log() - rows.seconds.log()).square().mean()
        value.backward()
        return value

    # torch's line search raises it where it finds no further descent; `logs` is the last point.
    with contextlib.suppress(IndexError):
        optimizer.step(loss)
    return logs.detach().clamp(low, high).exp()


def errors(rows: Rows, costs: Tensor, form: str = "sum") -> Tensor:
    """How far predictions are off, as a factor less one: 0.1 is ten percent either way."""
    return (predict(rows.work, costs, form).log() - rows.seconds.log()).abs().exp() - 1


def summarize(error: Tensor) -> dict[str, float | None]:
    """Median and worst; ``None`` where nothing could be judged."""
    if error.isnan().any():
        return {"median": None, "worst": None}
    return {"median": round(float(error.median()), 3), "worst": round(float(error.max()), 3)}


def held_out_errors(
    rows: Rows,
    shapes: Sequence[object],
    form: str,
    bounds: Mapping[str, float] | None = None,
    known: Mapping[str, float] | None = None,
) -> Tensor:
    """Errors of every row by rates fitted without the rows of its shape."""
    found = torch.full_like(rows.seconds, math.nan)
    if len(set(shapes)) < LEAST_SHAPES:
        return found
    for shape in dict.fromkeys(shapes):
        out = [i for i, other in enumerate(shapes) if other == shape]
        rest = [i for i in range(len(shapes)) if i not in out]
        found[out] = errors(rows.pick(out), fit(rows.pick(rest), form, bounds, known), form)
    return found


def to_rates(costs: Tensor, rows: Rows) -> dict[str, float]:
    """Rates under the names of `DeviceRates`, rounded; 0 where no row depends on one."""
    used = (rows.work > 0).any(0).tolist()
    values = [
        0.0 if not depends else float(cost) if seconds else 1 / float(cost)
        for cost, seconds, depends in zip(costs, IS_SECONDS, used, strict=True)
    ]
    return {name: float(f"{v:.{DIGITS}g}") for name, v in zip(RATES, values, strict=True)}
