"""Rates of this device for its user: what the cost model predicts, put right by a few timings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_masks import DEFAULT_SELECTOR
from ..functional import attention
from ..passes.attend import attend_selected
from ..passes.calls import SdpaCall
from ..passes.decision import CallShape, DeviceRates, device_name, find_rates, forecast_at

# Of each stage the rates that its time follows from, and those that its time is.
STAGES = {
    "dense": (("dense_flop_rate", "dense_exp_rate"), ("dense_launch",)),
    "masked": (("masked_flop_rate", "masked_exp_rate"), ()),
    "select": (("scoring_flop_rate", "sort_rate"), ("select_launch",)),
    "attend": (("sparse_flop_rate", "sparse_exp_rate"), ("sparse_launch", "block_seconds")),
}
# Too short for a GPU to be waited for.
HOST_LENGTH, HOST_CALLS = 1024, 100
TURNS = 5
DIGITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The calls that are timed.

    Attributes:
        heads: Query heads, key heads, head_dim.
        lengths: Tokens, for queries and keys alike.
    """

    heads: tuple[int, int, int]
    lengths: tuple[int, ...]


PLANS = {
    "cuda": Plan(heads=(32, 8, 128), lengths=(4096, 8192, 16384)),
    "cpu": Plan(heads=(9, 3, 64), lengths=(1024, 2048, 4096)),
}


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    show: Callable[[str], None] = lambda step: None,
    plan: Plan | None = None,
) -> DeviceRates:
    """Rates of a device, about a minute's work.

    Those that are known for it, or estimated, say how each stage of a call scales; each stage is
    timed at a few lengths, and its rates are multiplied by how much faster it was than predicted.

    Args:
        device: CPU or CUDA.
        dtype: Of the calls.
        show: Told what comes next.
        plan: What is timed; by default what suits the device.
    """
    plan = PLANS[device.type] if plan is None else plan
    # Of the CPU's, those of one thread.
    found = find_rates(device, dtype, threads=1).rates
    if not found.masked_flop_rate:
        # As fast as without a mask until the timings say otherwise.
        found = replace(
            found,
            masked_flop_rate=found.dense_flop_rate,
            masked_exp_rate=found.dense_exp_rate,
        )
    name = device_name(device.type, device.index)
    found = replace(found, device=name, dtype=str(dtype).removeprefix("torch."))
    faster: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with torch.no_grad():
        for length in plan.lengths:
            show(f"{length} tokens")
            shape = call_shape(plan.heads, length, dtype, device)
            for stage, ratio in _ratios(shape, found, device).items():
                faster[stage].append(ratio)
        host = _host_seconds(plan, dtype, device) if device.type == "cuda" else {}
    return _corrected(found, {stage: median(ratios) for stage, ratios in faster.items()}, host)


def call_shape(
    heads: tuple[int, int, int], length: int, dtype: torch.dtype, device: torch.device
) -> CallShape:
    """A causal call of so many tokens; heads are those of queries, of keys, and the head_dim."""
    q_heads, kv_heads, head_dim = heads
    return CallShape(
        batch=1,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=length,
        kv_len=length,
        head_dim=head_dim,
        value_dim=head_dim,
        is_causal=True,
        causal_lower_right=False,
        masked=False,
        dtype=dtype,
        device=device,
    )


def _inputs(shape: CallShape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(shape.device).manual_seed(0)
    sizes = ((shape.q_heads, shape.q_len), *((shape.kv_heads, shape.kv_len),) * 2)
    query, key, value = (
        torch.randn((1, heads, tokens, shape.head_dim), generator=generator, device=shape.device)
        for heads, tokens in sizes
    )
    return query.to(shape.dtype), key.to(shape.dtype), value.to(shape.dtype)


def _ratios(shape: CallShape, rates: DeviceRates, device: torch.device) -> dict[str, float]:
    """How many times as fast as predicted each stage of a call is."""
    query, key, value = _inputs(shape)
    dense = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    row = torch.arange(shape.q_len, device=device)
    mask = (row <= row[:, None])[None, None]
    choose = torch.compile(_select, dynamic=False)
    selection = DEFAULT_SELECTOR.select(query, key, is_causal=True)
    call = SdpaCall(query=query, key=key, value=value, is_causal=True, enable_gqa=True)
    runs: dict[str, Callable[[], Any]] = {
        "dense": partial(dense, is_causal=True),
        "masked": partial(dense, attn_mask=mask),
        "select": partial(choose, query, key),
        "attend": partial(attend_selected, call, selection, compiled=True),
    }
    free = forecast_at(shape, DEFAULT_SELECTOR, rates, selection.density())
    masked = forecast_at(shape._replace(masked=True), DEFAULT_SELECTOR, rates)
    predicted = {
        "dense": free.dense_seconds,
        "masked": masked.dense_seconds,
        "select": free.select_seconds,
        "attend": free.attend_seconds,
    }
    return {stage: predicted[stage] / _seconds(run, device) for stage, run in runs.items()}


def _select(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    return DEFAULT_SELECTOR.select(query, key, is_causal=True).block_lists()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of a call: of the GPU, or of the process where the CPU computes."""
    run()
    return min(_once(run, device) for _ in range(TURNS))


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    # The second is launched while the first runs.
    run()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 2e3


def _host_seconds(plan: Plan, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What Python takes to launch a compiled call, dense and sparse."""
    inputs = _inputs(call_shape(plan.heads, HOST_LENGTH, dtype, device))
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
    calls: dict[str, Any] = {
        "dense_host_seconds": torch.compile(F.scaled_dot_product_attention),
        "sparse_host_seconds": torch.compile(attention),
    }

    def turn(call: Any) -> float:
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call(*inputs, **options)
        seconds = (time.perf_counter() - begin) / HOST_CALLS
        torch.cuda.synchronize(device)
        return seconds

    for call in calls.values():
        call(*inputs, **options)
    return {name: min(turn(call) for _ in range(TURNS)) for name, call in calls.items()}


def _corrected(rates: DeviceRates, faster: dict[str, float], host: dict[str, float]) -> DeviceRates:
    changed: dict[str, Any] = dict(host)
    for stage, (speeds, seconds) in STAGES.items():
        for name in speeds:
            changed[name] = getattr(rates, name) * faster[stage]
        for name in seconds:
            changed[name] = getattr(rates, name) / faster[stage]
    rounded: dict[str, Any] = {
        name: float(f"{value:.{DIGITS}g}") for name, value in changed.items()
    }
    return replace(rates, **rounded)
